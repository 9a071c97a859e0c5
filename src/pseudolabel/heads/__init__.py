"""Trainable heads beside a classifier, which make better maps."""

from pseudolabel.heads.intra_class_discriminator import (
    BottomUpOutput,
    FixedScaleBatchNorm2d,
    ICDBottomUp,
    ICDOutput,
    ICDTopDown,
    IntraClassDiscriminator,
    icd_bottom_up_loss,
    icd_orient,
    icd_project,
    icd_side_statistics,
    icd_targets,
    icd_top_down_loss,
    icd_update_sides,
    icd_warmup,
)

__all__ = [
    "BottomUpOutput",
    "FixedScaleBatchNorm2d",
    "ICDBottomUp",
    "ICDOutput",
    "ICDTopDown",
    "IntraClassDiscriminator",
    "icd_bottom_up_loss",
    "icd_orient",
    "icd_project",
    "icd_side_statistics",
    "icd_targets",
    "icd_top_down_loss",
    "icd_update_sides",
    "icd_warmup",
]
