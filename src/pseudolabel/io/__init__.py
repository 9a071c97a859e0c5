"""Images, labels, masks and maps on disk.

Whatever is read is checked, whatever is written is written whole: an error names the file and what is wrong
with it, and a file that was there before stays as it was.
"""

from pseudolabel.io._unpickle import UnsafePickleError
from pseudolabel.io.cam_archive import StoredCAM, read_cam, write_cam
from pseudolabel.io.image import image_size, read_image
from pseudolabel.io.labels import VOC_CLASSES, ImageLabels, read_cls_labels, read_labels, write_labels
from pseudolabel.io.legacy import read_legacy_cam
from pseudolabel.io.lists import ListEntry, VOCLayout, find_images, read_list
from pseudolabel.io.mask import colorize_mask, read_mask, voc_palette, write_mask

__all__ = [
    "VOC_CLASSES",
    "ImageLabels",
    "ListEntry",
    "StoredCAM",
    "UnsafePickleError",
    "VOCLayout",
    "colorize_mask",
    "find_images",
    "image_size",
    "read_cam",
    "read_cls_labels",
    "read_image",
    "read_labels",
    "read_legacy_cam",
    "read_list",
    "read_mask",
    "voc_palette",
    "write_cam",
    "write_labels",
    "write_mask",
]
