"""Each paper's whole way from maps to masks, written with the parts and the paper's defaults."""

from pseudolabel.recipes.icd import icd
from pseudolabel.recipes.infercam import infercam
from pseudolabel.recipes.pmm import pmm

__all__ = ["icd", "infercam", "pmm"]
