"""Each paper's whole way from maps to masks, written with the parts and the paper's defaults."""

from pseudolabel.recipes.icd import icd
from pseudolabel.recipes.infercam import infercam
from pseudolabel.recipes.matlabel import matlabel
from pseudolabel.recipes.pmm import pmm
from pseudolabel.recipes.rtc import RTCLoss, RTCOutput, ViewOutput, rtc

__all__ = ["RTCLoss", "RTCOutput", "ViewOutput", "icd", "infercam", "matlabel", "pmm", "rtc"]
