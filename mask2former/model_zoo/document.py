"""MODEL_ZOO.md, made from the table."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from .table import PREFIX, Entry, entries

__all__ = ["document"]

INTRODUCTION = """\
# Model zoo

The 59 models that the authors of Mask2Former published. Their figures, in percent, are those of the
[published table](https://github.com/facebookresearch/Mask2Former/blob/main/MODEL_ZOO.md): they were measured by the
authors, with their code. Each backbone's name leads to the recipe.

**The weights are licensed under [CC-BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/): not for commercial
use.** This project neither holds nor changes them; its own licence, Apache-2.0, covers the code.

An address, `mask2former://` and a name, stands wherever Detectron2 takes a file of weights. A name is enough for the
commands and in Python:

```bash
python demo/demo.py --input street.jpg --model cityscapes/panoptic-segmentation/maskformer2_R50_bs16_90k
python train_net.py --config-file configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml --eval-only \\
    MODEL.WEIGHTS mask2former://coco/panoptic-segmentation/maskformer2_R50_bs16_50ep
python -m mask2former.model_zoo coco/panoptic-segmentation/maskformer2_R50_bs16_50ep   # download, and say where it is
```

```python
from mask2former import model_zoo

predictor = model_zoo.get("coco/panoptic-segmentation/maskformer2_R50_bs16_50ep", confidence_threshold=0.5)
outputs = predictor("street.jpg")
```

The first use downloads the weights into `$FVCORE_CACHE`, or else `~/.torch/iopath_cache`, where Detectron2 keeps its
downloads too. A cut download goes on where it ended, and a file gets its name when its MD5 hash is checked, whose first
six digits are in the name. For a machine without a network, put the file there by hand: `mask2former/<name>/<file>`.

The files are pickles. What is here reads only arrays from them; Detectron2's `DefaultPredictor` runs any code in them.
"""
VIDEO_NOTE = "Their recipes and the model for videos are not here yet."


def document() -> str:
    """All models in tables of Markdown, one a data set and task."""
    lines = [INTRODUCTION]
    for data_set, of_data_set in groupby(entries(), key=lambda entry: entry.data_set):
        lines.append(f"## {data_set}\n")
        for task, rows in groupby(of_data_set, key=lambda entry: entry.task):
            lines += [f"### {task}\n", *_section(list(rows)), ""]
    return "\n".join(lines)


def _section(rows: Sequence[Entry]) -> list[str]:
    note = [VIDEO_NOTE, ""] if rows[0].is_video else []
    columns = [*rows[0].training, *rows[0].figures]
    return note + [
        _row(["backbone", *columns, "address", "weights"]),
        _row(["---", *["---:"] * len(columns), "---", "---"]),
        *(_row(_cells(entry)) for entry in rows),
    ]


def _cells(entry: Entry) -> list[str]:
    backbone = entry.backbone if entry.is_video else f"[{entry.backbone}](configs/{entry.recipe}.yaml)"
    figures = [*entry.training.values(), *entry.figures.values()]
    return [backbone, *figures, f"`{PREFIX}{entry.name}`", f"[{entry.file_name}]({entry.url})"]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
