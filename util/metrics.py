"""Running averages of losses that stay on the device until somebody wants to read them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .distributed import all_gather_object


class SmoothedValue:
    """A series of numbers: the recent median and mean, and the mean over everything.

    Args:
        window: how many recent numbers the median and the recent mean look at.
    """

    def __init__(self, window: int = 20) -> None:
        self.recent: deque[float] = deque(maxlen=window)
        self.total = 0.0
        self.count = 0.0

    def update(self, total: float, count: float = 1.0) -> None:
        """Add the sum of ``count`` things; a count of 0 still adds to the sum."""
        self.recent.append(total / count if count else total)
        self.total += total
        self.count += count

    @property
    def median(self) -> float:
        """Median of the recent numbers; the lower one of an even count."""
        return torch.tensor(list(self.recent), dtype=torch.float64).median().item()

    @property
    def recent_mean(self) -> float:
        """Mean of the recent numbers."""
        return sum(self.recent) / len(self.recent)

    @property
    def global_mean(self) -> float:
        """Sum of everything over the count of everything, at least one."""
        return self.total / max(self.count, 1.0)


class MetricLogger:
    """Named running averages, fed with tensors and read rarely.

    `update` only queues tensors; `read` brings all queued ones to the host in one copy. Whoever reads at every step
    anyway, as training does to see that all is finite, writes log lines for nothing. Until `synchronize` the numbers
    are those of this process.
    """

    def __init__(self, window: int = 20) -> None:
        self._window = window
        self._meters: dict[str, SmoothedValue] = {}
        self._queued: list[tuple[tuple[str, ...], Tensor, tuple[float, ...]]] = []

    def update(self, sums: Mapping[str, Tensor], counts: Mapping[str, float] | None = None) -> None:
        """Queue one step.

        Args:
            sums: name -> 0-d tensor, all on one device.
            counts: name -> how many things the tensor sums up; 1 where left out.
        """
        names = tuple(sums)
        with torch.no_grad():
            values = torch.stack([value.float() for value in sums.values()])
        self._queued.append((names, values, tuple((counts or {}).get(name, 1.0) for name in names)))

    def read(self) -> dict[str, float]:
        """Move everything queued into the averages; one host synchronisation if there is anything.

        Returns:
            name -> mean of the newest step that had it, of those that were queued.
        """
        if not self._queued:
            return {}
        flat = torch.cat([values for _, values, _ in self._queued]).tolist()
        start = 0
        for names, _, counts in self._queued:
            for name, total, count in zip(names, flat[start : start + len(names)], counts, strict=True):
                self._meters.setdefault(name, SmoothedValue(self._window)).update(total, count)
            start += len(names)
        newest = {name: self._meters[name].recent[-1] for names, _, _ in self._queued for name in names}
        self._queued.clear()
        return newest

    def synchronize(self) -> None:
        """Add up the sums and counts of all processes; every process must call it."""
        self.read()
        mine = {name: (meter.total, meter.count) for name, meter in self._meters.items()}
        everybody = all_gather_object(mine)
        for name in {name for totals in everybody for name in totals}:
            meter = self._meters.setdefault(name, SmoothedValue(self._window))
            # In the order of the ranks, so that all processes get the same last bit.
            meter.total = sum(totals[name][0] for totals in everybody if name in totals)
            meter.count = sum(totals[name][1] for totals in everybody if name in totals)

    def averages(self) -> dict[str, float]:
        """Return name -> mean over everything read so far."""
        self.read()
        return {name: meter.global_mean for name, meter in self._meters.items()}

    def describe(self, names: Iterable[str], weights: Mapping[str, float]) -> str:
        """Return "name median (mean)" of the names that exist, times their weights, after reading what is queued."""
        self.read()
        known = [(name, weights.get(name, 1.0), self._meters[name]) for name in names if name in self._meters]
        return "  ".join(f"{name} {w * meter.median:.4f} ({w * meter.global_mean:.4f})" for name, w, meter in known)


def loss_stats(averages: Mapping[str, float], weight_dict: Mapping[str, float]) -> dict[str, float]:
    """Spread raw losses over the official log names: weighted plain, raw with the suffix `_unscaled`.

    Args:
        averages: raw losses, with the weighted total as `loss`.
        weight_dict: weights of the losses that enter the total.

    Returns:
        name -> value; `class_error` also keeps its plain name, entries that are no losses theirs.
    """
    plain = ("loss", "grad_norm")
    stats = {name: averages[name] for name in (*plain, "class_error") if name in averages}
    stats |= {name: weight * averages[name] for name, weight in weight_dict.items() if name in averages}
    return stats | {f"{name}_unscaled": value for name, value in averages.items() if name not in plain}
