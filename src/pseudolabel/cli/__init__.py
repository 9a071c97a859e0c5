"""The command line: `pseudolabel demo | generate | evaluate | view | train`.

Exit codes: 0 all done; 1 done but for the images that were reported; 2 nothing (more) could be done: wrong
usage, a file that is not what it should be, a folder that cannot be written; 3 a fault of this program or of
the network, with its traceback; 130 interrupted.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import TypeAlias

from pseudolabel.cli._text import one_line

__all__ = ["main"]

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - has no other name


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: Arguments without the program's name, `sys.argv[1:]` by default.

    Returns:
        0 all done, 1 some images skipped or missing, 2 usage and files, 3 a fault (its traceback goes to
        stderr), 130 interrupted.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    try:
        # A command is imported when it runs: `--help` needs no torch.
        return int(import_module(f"pseudolabel.cli.{args.command}").run(args))
    except KeyboardInterrupt:
        _say("pseudolabel: interrupted")
        return 130
    except (OSError, ValueError) as error:  # UserError, and what the library says about files and settings
        if args.debug:
            raise
        _say(f"pseudolabel {args.command}: error: {_one_line(error)}")
        return 2
    except Exception:
        if args.debug:
            raise
        traceback.print_exc()
        return 3


def _say(message: str) -> None:
    with suppress(OSError):  # a broken pipe
        print(message, file=sys.stderr)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return one_line(str(error)) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pseudolabel",
        description="From image-level labels to pixel masks.",
        epilog="Exit codes: 0 all done, 1 done but for the images reported, 2 wrong usage or files, "
        "3 a fault, 130 interrupted.",
    )
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_add_demo, _add_generate, _add_evaluate, _add_view, _add_train):
        # After the command as well; suppressed where absent, so that it does not undo the one above.
        add(commands).add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return parser


class _PrintVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from pseudolabel import __version__  # noqa: PLC0415

        print(f"pseudolabel {__version__}")
        parser.exit()


def _add_demo(commands: _Commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "demo",
        help="the whole way on drawn scenes, nothing to download",
        description="Draw scenes, train a small classifier on their image-level labels, make masks, score "
        "each stage. Photos, labels, masks, truth, the classifier and a picture of panels are left in OUT.",
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder to write to (default: demo)")
    parser.add_argument(
        "--images", type=_count, default=500, metavar="N", help="scenes to draw (default: 500)"
    )
    parser.add_argument("--epochs", type=_count, default=30, metavar="N", help="of training (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of the training (default: 0)")
    return parser


def _add_generate(commands: _Commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "generate",
        help="masks for a folder of photos with image-level labels",
        description="Make a mask NAME.png for each photo: maps of the classifier at several scales, "
        "restricted to the photo's labels, then the method. Run again, it goes on where it stopped: masks "
        "that are there, whole and in keeping with photo and labels are left alone. A photo that cannot be "
        "read or computed is reported and skipped, and the exit code is 1.",
    )
    add = parser.add_argument
    add("images", metavar="IMAGES", help="folder of photos")
    add(
        "--labels",
        required=True,
        metavar="FILE",
        help="image-level labels: .csv (id, then a 0/1 column a class) "
        "or .npy (cls_labels.npy, with --allow-pickle)",
    )
    add(
        "--model",
        required=True,
        metavar="NAME",
        help="module:function, a callable without arguments that returns the classifier as an nn.Module, "
        "the current folder is searched as well; or hf:NAME or timm:NAME, a classifier of transformers or "
        "timm: a folder, or a name of their hub, which is asked over the network if it is not in its cache",
    )
    add(
        "--weights",
        metavar="FILE",
        help="its state dict: .safetensors, .pt or .pth (read with weights_only) or .npz; every name must "
        "fit (hf: and timm: have their own)",
    )
    add("--list", metavar="FILE", help="make the masks of the images of this list only")
    add("--out", required=True, metavar="DIR", help="folder of the masks")
    add(
        "--method",
        choices=("cam", "infercam", "pmm"),
        default="pmm",
        help="pmm: coefficient-of-variation smoothing and proportional masks; cam: the maps against a "
        "constant background; infercam: maps of class-conditional inference, which takes many times longer, "
        "against a constant background (default: pmm)",
    )
    add(
        "--alpha",
        type=float,
        metavar="A",
        help="pmm: exponent of the background; larger gives more foreground "
        "(default: 11; broad maps want less, down to 1)",
    )
    add(
        "--background",
        type=float,
        metavar="T",
        help="cam, infercam: score of the background (default: 0.15, 0.2)",
    )
    add(
        "--crf",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="refine with a dense CRF (default: pmm does, cam and infercam do not)",
    )
    add(
        "--maps",
        choices=("auto", "cam", "gradcam"),
        default="auto",
        help="cam reads the maps off the classifier's weights, gradcam takes gradients; auto is cam where "
        "that is exact, or the network is your own and cam works (default: auto)",
    )
    add(
        "--layer",
        metavar="NAME",
        help="module whose output are the features (default: what is pooled before the classifier, or what "
        "Grad-CAM finds)",
    )
    add("--classifier", metavar="NAME", help="module of the classifier (default: the last linear one)")
    add(
        "--scales",
        type=float,
        nargs="+",
        default=[0.5, 1.0, 1.5, 2.0],
        metavar="S",
        help="scales at which the photo is seen (default: 0.5 1 1.5 2)",
    )
    add("--no-flip", dest="flip", action="store_false", help="do not look at the mirrored photo as well")
    for name, what in (
        ("--mean", "the network sees (image - mean) / std of an image in [0, 1] "),
        ("--std", ""),
    ):
        told = f"{what}(default: that of hf: and timm: networks, else ImageNet's)"
        add(name, type=float, nargs=3, metavar=("R", "G", "B"), help=told)
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    add(
        "--workers",
        "--num-threads",
        type=_count,
        metavar="N",
        help="batches in work at a time, each on a thread of its own, or with --engine ray in a process "
        "(default: the cores of the machine, and 2 more with another device, 8 at most)",
    )
    add(
        "--batch-size",
        type=_count,
        metavar="N",
        help="photos of one size that go through the network together (default: 1 on a cpu, else 8)",
    )
    add(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="make the I-th of N parts, I from 1: for several runs into one --out, on one machine or many",
    )
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local: threads of this process; ray: processes of a Ray cluster, RAY_ADDRESS or this machine",
    )
    add(
        "--gpus",
        type=float,
        metavar="F",
        help="with --engine ray, the share of a GPU that a worker takes, such as 0.25 (default: 1 on cuda)",
    )
    add("--save-cams", metavar="DIR", help="keep the maps as well, scaled to [0, 1], as NAME.npz")
    add("--overwrite", action="store_true", help="make all masks anew")
    add(
        "--allow-pickle",
        action="store_true",
        help="read --labels from a .npy file, through an unpickler that admits arrays alone",
    )
    return parser


def _add_normalization(parser: argparse.ArgumentParser) -> None:
    for name, default, what in (
        ("--mean", [0.485, 0.456, 0.406], "the network sees (image - mean) / std of an image in [0, 1] "),
        ("--std", [0.229, 0.224, 0.225], ""),
    ):
        told = f"{what}(default: ImageNet's, {' '.join(map(str, default))})"
        parser.add_argument(name, type=float, nargs=3, default=default, metavar=("R", "G", "B"), help=told)


def _add_evaluate(commands: _Commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "evaluate",
        help="score masks against truth",
        description="IoU, over- and under-segmentation of each class over the whole set. Masks and truth are "
        "PNGs of class indices (0 background, 255 ignore) that go by the same name. Where one of the two is "
        "missing, the others are scored, it is reported, and the exit code is 1.",
    )
    add = parser.add_argument
    add("masks", metavar="MASKS", help="folder of masks")
    add("truth", metavar="TRUTH", help="folder of ground-truth masks")
    add("--list", metavar="FILE", help="score the images of this list only")
    add("--classes", metavar="FILE", help="names of the classes, one a line, background first")
    add(
        "--num-classes",
        type=_count,
        metavar="N",
        help="number of classes with background (default: from --classes, or else the largest index found)",
    )
    add(
        "--pred-ignore",
        choices=("error", "background", "exclude", "wrong"),
        default="error",
        help="what 255 in a mask means where the truth is labelled (default: error)",
    )
    add(
        "--absent",
        choices=("skip", "nan"),
        default="skip",
        help="mIoU leaves out classes without a true pixel "
        "(skip), or only those without a predicted one either (nan) (default: skip)",
    )
    add("--json", action="store_true", help="print the figures as JSON")
    add("--workers", type=_count, default=2, metavar="N", help="files read at a time (default: 2)")
    return parser


def _add_view(commands: _Commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "view",
        help="a picture of photos and their masks",
        description="Draw photo, maps, mask and truth side by side, a row an image, into one PNG.",
    )
    add = parser.add_argument
    add("images", metavar="IMAGES", help="folder of photos")
    add("masks", metavar="MASKS", help="folder of masks")
    add("--out", required=True, metavar="FILE.png", help="the picture")
    add("--truth", metavar="DIR", help="folder of ground-truth masks")
    add("--cams", metavar="DIR", help="folder of maps (generate --save-cams)")
    add(
        "--classes", metavar="FILE", help="names of the classes, one a line, background first, for the legend"
    )
    add("--limit", type=_count, default=8, metavar="N", help="number of rows (default: 8)")
    return parser


def _add_train(commands: _Commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "train",
        help="a classifier from image-level labels, or a segmenter from masks",
        description="A small training loop. OUT gets checkpoint.pt, log.jsonl (a line a step) and "
        "weights.pt. Run again after it was stopped, it goes on from the checkpoint as if it had not been. "
        "Under torchrun, each process takes a part of every batch.",
    )
    add = parser.add_argument
    add("job", choices=("classifier", "segmenter"), help="what to train")
    add("images", metavar="IMAGES", help="folder of photos")
    add("--labels", metavar="FILE", help="classifier: image-level labels, .csv or .npy, as for generate")
    add("--allow-pickle", action="store_true", help="read --labels from a .npy file")
    add("--masks", metavar="DIR", help="segmenter: folder of masks, NAME.png, 255 without loss")
    add("--list", metavar="FILE", help="train on the images of this list only")
    add(
        "--model",
        required=True,
        metavar="MODULE:FUNCTION",
        help="callable without arguments that returns the network as an nn.Module: images (B,3,h,w) to "
        "logits, (B,classes) of a classifier, (B,1+classes,h',w') of a segmenter",
    )
    add("--weights", metavar="FILE", help="weights to begin with (default: those the factory gives it)")
    add("--out", required=True, metavar="DIR", help="folder of checkpoint, log and weights")
    add("--overwrite", action="store_true", help="begin anew, whatever OUT holds")
    add("--epochs", type=_count, default=20, metavar="N", help="times each photo is seen (default: 20)")
    add(
        "--batch-size",
        type=_count,
        default=16,
        metavar="N",
        help="photos a step, over all processes (default: 16)",
    )
    add("--crop", type=_count, default=320, metavar="N", help="side of what the network sees (default: 320)")
    add(
        "--scales",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="the photo's longer side is drawn between these times --crop "
        "(default: 0.625 1.25 for a classifier, 0.5 2 for a segmenter)",
    )
    add("--no-flip", dest="flip", action="store_false", help="do not mirror photos at random")
    _add_normalization(parser)
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="sgd has momentum 0.9 (default: sgd)")
    add("--lr", type=float, default=0.01, help="learning rate at the start; falls to 0 (default: 0.01)")
    add("--weight-decay", type=float, default=5e-4, metavar="W", help="(default: 5e-4)")
    add(
        "--loss",
        choices=("ce", "puf"),
        default="ce",
        help="segmenter: puf is pretended under-fitting (default: ce)",
    )
    add(
        "--puf-mode",
        choices=("clamp", "ignore", "pow"),
        help="what puf does to badly fitted pixels (default: clamp)",
    )
    add("--beta", type=float, help="puf: it begins when the mean loss is below (default: 0.5)")
    add("--k", type=float, help="puf: level (default: that of --beta), or exponent of pow (default: 0.5)")
    add(
        "--gate-over",
        choices=("all", "valid", "classes"),
        help="puf: the mean runs over all pixels, the labelled ones, or the classes with a mean each "
        "(default: all)",
    )
    add("--seed", type=int, default=0, help="of weights, order, augmentation and dropout (default: 0)")
    add("--amp", choices=("no", "bf16", "fp16"), default="no", help="mixed precision (default: no)")
    add(
        "--device",
        default="cpu",
        help="cpu, cuda, cuda:1, ... (default: cpu); under torchrun cuda is one each",
    )
    add("--workers", type=_count, default=2, metavar="N", help="threads that read photos (default: 2)")
    add(
        "--save-every", type=_count, default=200, metavar="N", help="steps between checkpoints (default: 200)"
    )
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {number}")
    return number


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"expected I/N with 1 <= I <= N, such as 3/8, got {text!r}")
    return int(part), int(parts)
