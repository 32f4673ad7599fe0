"""Category ids of an annotation file as class labels of the model, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .annotations import DatasetError

LABEL_MAPPINGS = ("ids", "contiguous")
# Ids are rows of the classifier; a file that numbers its categories by hashes would ask for millions of them.
_LARGEST_ID = 9999


class LabelMap:
    """Which label each category has.

    Args:
        categories: entries with ``id`` and ``name``; entries of several files may repeat each other.
        mapping: "ids" uses the category ids themselves, gaps included (COCO: 80 categories, 91 classes);
            "contiguous" numbers the categories 0..K-1 in the order of their ids.
        num_classes: classes of the model, at least as many as the labels need; None = just these.

    Attributes:
        num_classes: K, rows of the classifier.
        class_names: K names; "N/A" where a label stands for no category.
        label_to_category: label -> category id, or None when they are the same.

    Raises:
        DatasetError: ids do not suit the mapping, files disagree about a name, or ``num_classes`` is too small.
    """

    def __init__(
        self, categories: Iterable[Mapping[str, Any]], *, mapping: str = "ids", num_classes: int | None = None
    ) -> None:
        names: dict[int, str] = {}
        for category in categories:
            if names.setdefault(category["id"], category["name"]) != category["name"]:
                raise DatasetError(
                    f"category {category['id']} is '{names[category['id']]}' in one annotation file and "
                    f"'{category['name']}' in the other; give both the same categories"
                )
        if not names:
            raise DatasetError("the annotation file lists no category; add its list 'categories'")
        if mapping not in LABEL_MAPPINGS:
            raise DatasetError(f"--label_mapping is one of {', '.join(LABEL_MAPPINGS)}, got '{mapping}'")
        self._category_ids = np.array(sorted(names), dtype=np.int64)
        contiguous = mapping == "contiguous"
        if not contiguous and not 0 <= self._category_ids[0] <= self._category_ids[-1] <= _LARGEST_ID:
            raise DatasetError(
                f"category ids {self._category_ids[0]} to {self._category_ids[-1]} cannot serve as labels "
                f"(0 to {_LARGEST_ID} can); pass --label_mapping contiguous"
            )
        needed = len(names) if contiguous else int(self._category_ids[-1]) + 1
        if num_classes is not None and num_classes < needed:
            raise DatasetError(
                f"the annotations need {needed} classes, --num_classes is {num_classes}: leave it out, raise it"
                + ("" if contiguous else ", or pass --label_mapping contiguous")
            )
        self.num_classes = needed if num_classes is None else num_classes
        self.label_to_category = dict(enumerate(self._category_ids.tolist())) if contiguous else None
        labels = range(len(names)) if contiguous else self._category_ids.tolist()
        self.class_names = ["N/A"] * self.num_classes
        for label, category_id in zip(labels, self._category_ids.tolist(), strict=True):
            self.class_names[label] = names[category_id]

    def to_labels(self, category_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Turn (N,) known category ids into labels."""
        return category_ids if self.label_to_category is None else np.searchsorted(self._category_ids, category_ids)

    def to_categories(self, labels: Tensor) -> Tensor:
        """Turn labels of any shape into category ids; a label of no category becomes -1, which no evaluator counts."""
        if self.label_to_category is None:
            return labels
        known = torch.from_numpy(self._category_ids)
        table = torch.cat((known, known.new_full((self.num_classes - len(known),), -1)))
        return table.to(labels.device)[labels]
