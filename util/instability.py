"""How much the matching of queries and objects changes from one epoch to the next.

DN-DETR (CVPR 2022), "Stabilize Hungarian matching": after every epoch V_n is the object that query n of an image is
matched to, or -1. The instability of the image is the number of queries whose V_n is another one than an epoch before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import atomic_save, load_checkpoint
from .distributed import all_gather_object, is_main_process
from .errors import CheckpointError

# image id -> query -> object; queries matched to nothing are left out.
Matches = dict[int, dict[int, int]]
Matcher = Callable[[dict[str, Tensor], Sequence[dict[str, Tensor]]], Sequence[tuple[Tensor, Tensor]]]
MATCHES_FILE = "matches.pth"
_log = logging.getLogger(__name__)


def matching_instability(before: Matches, after: Matches) -> float:
    """Return the mean over images of the number of queries matched to another object than before.

    A query that is matched to nothing at one of the two times counts too: with n objects, an image has at most 2 n.

    Raises:
        ValueError: the images are not the same.
    """
    if before.keys() != after.keys():
        raise ValueError(f"expected the matches of the same images, got {len(before)} and {len(after)} images")
    changed = 0
    for image_id, new in after.items():
        old = before[image_id]
        changed += sum(old.get(query) != new.get(query) for query in old.keys() | new.keys())
    return changed / max(len(after), 1)


class MatchingHistory:
    """Matches of the evaluated images, kept from one epoch to the next in the output folder.

    They stand in a file of their own because checkpoints are written before the evaluation.

    Args:
        matcher: outputs and targets -> per image (query index, object index); matches the last decoder layer.
        folder: where `matches.pth` is kept, None keeps it in memory only.
    """

    def __init__(self, matcher: Matcher, folder: Path | None) -> None:
        self._matcher = matcher
        self._path = folder / MATCHES_FILE if folder is not None else None
        self._now: Matches = {}
        # Process 0 compares and writes; the others only match their images.
        self._epoch, self._before = self._read() if is_main_process() else (None, {})

    def add(self, outputs: dict[str, Any], targets: Sequence[dict[str, Tensor]]) -> None:
        """Match one batch.

        Args:
            outputs: of a detector; targets: with `labels`, `boxes` and `image_id`.
        """
        last_layer = {name: outputs[name] for name in ("pred_logits", "pred_boxes")}
        for target, (queries, objects) in zip(targets, self._matcher(last_layer, targets), strict=True):
            self._now[int(target["image_id"])] = dict(zip(queries.tolist(), objects.tolist(), strict=True))

    def finish_epoch(self, epoch: int) -> dict[str, float]:
        """Compare all that was added with the epoch before, and keep it; every process must call it.

        Returns:
            `instability`, on process 0; nothing where the epoch before is not known, or of other images.

        Raises:
            CheckpointError: the file cannot be written.
        """
        gathered: Matches = {}
        for matches in all_gather_object(self._now):
            gathered |= matches
        self._now = {}
        if not is_main_process():
            return {}
        same = self._epoch == epoch - 1 and self._before.keys() == gathered.keys()
        score = {"instability": matching_instability(self._before, gathered)} if same else {}
        self._epoch, self._before = epoch, gathered
        if self._path is not None:
            atomic_save({"epoch": epoch, "matches": gathered}, self._path)
        return score

    def _read(self) -> tuple[int | None, Matches]:
        if self._path is None or not self._path.exists():
            return None, {}
        try:
            content: Mapping[str, Any] = load_checkpoint(self._path)
            return content["epoch"], content["matches"]
        except (CheckpointError, KeyError) as error:
            _log.warning("%s cannot be used (%s): the next epoch has no instability", self._path, error)
            return None, {}
