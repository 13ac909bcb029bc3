"""The Trainer's dataset: numbers of forward-backward passes, because the data come from rollouts.

accelerate's prepared loaders read one batch ahead, so a rollout inside a dataset would act with weights that are one
update old. The ticks carry no data; the trainer slices its rollout by them.
"""

from torch.utils.data import DataLoader, Dataset


class TickDataset(Dataset[int]):
    """The ticks 0 … n−1 of one iteration."""

    def __init__(self, ticks: int) -> None:
        self.ticks = ticks

    def __len__(self) -> int:
        return self.ticks

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.ticks:
            raise IndexError(index)
        return index


def tick_loader(dataset: TickDataset) -> DataLoader[int]:
    """Yields {"tick": i} in order, the same on every process."""
    return DataLoader(dataset, batch_size=1, shuffle=False, collate_fn=lambda ticks: {"tick": ticks[0]})
