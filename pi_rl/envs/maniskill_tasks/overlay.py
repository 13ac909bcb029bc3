"""Pictures put together from a rendered foreground, a photograph behind it and, as a disturbance, a texture over it.

All functions take B pictures at once and treat each alone.
"""

import torch


def is_foreground(segmentation: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Where a picture shows one of the things that are kept.

    Args:
        segmentation: Integers (B, h, w), number of the thing in each pixel.
        kept: int64 (B, n), numbers of the things to keep.

    Returns:
        bool (B, h, w).
    """
    flat = segmentation.reshape(len(segmentation), -1).long()
    highest = int(max(flat.max(), kept.max()))
    table = torch.zeros(len(flat), highest + 1, dtype=torch.bool, device=flat.device)
    table.scatter_(1, kept, True)
    return table.gather(1, flat).reshape(segmentation.shape)


def bounds(mask: torch.Tensor) -> torch.Tensor:
    """The smallest boxes around what is true.

    Args:
        mask: bool (B, h, w).

    Returns:
        int64 (B, 4): first column, first row, last column, last row; zeros where nothing is true.
    """
    found = []
    for along in (mask.any(1), mask.any(2)):  # columns, rows: bool (B, n)
        size = along.shape[1]
        number = along.long()
        first = number.argmax(1)
        last = size - 1 - number.flip(1).argmax(1)
        some = along.any(1)
        found.append((first * some, last * some))
    (left, right), (top, bottom) = found
    return torch.stack([left, top, right, bottom], dim=1)


def blend_foreground(
    images: torch.Tensor, mask: torch.Tensor, textures: torch.Tensor, strength: float
) -> torch.Tensor:
    """Lays a texture over the foreground, stretched to the box around it: it moves and grows with the robot.

    Args:
        images: float32 (B, h, w, 3).
        mask: bool (B, h, w), the foreground.
        textures: float32 (B, H, W, 3).
        strength: Share of the texture.

    Returns:
        float32 (B, h, w, 3).
    """
    height, width = mask.shape[1:]
    left, top, right, bottom = (edge[:, None] for edge in bounds(mask).unbind(1))
    columns = torch.arange(width, device=mask.device)[None]
    rows = torch.arange(height, device=mask.device)[None]
    across = (2 * (columns - left) + 1) / (right - left + 1) - 1  # the middle of a pixel, -1 and 1 at the box's edges
    down = (2 * (rows - top) + 1) / (bottom - top + 1) - 1
    grid = torch.stack(torch.broadcast_tensors(across[:, None, :], down[:, :, None]), dim=-1)
    stretched = torch.nn.functional.grid_sample(
        textures.permute(0, 3, 1, 2), grid, mode="bilinear", padding_mode="border", align_corners=False
    ).permute(0, 2, 3, 1)
    share = strength * mask[..., None]
    return images * (1 - share) + stretched * share


def blend_image(images: torch.Tensor, mask: torch.Tensor, textures: torch.Tensor, strength: float) -> torch.Tensor:
    """Lays a part of a texture over the whole picture: the part moves with the middle of the foreground.

    Args:
        images: float32 (B, h, w, 3).
        mask: bool (B, h, w), the foreground.
        textures: float32 (B, 2h, 2w, 3).
        strength: Share of the texture.

    Returns:
        float32 (B, h, w, 3).
    """
    height, width = mask.shape[1:]
    left, top, right, bottom = bounds(mask).unbind(1)
    columns = ((left + right) // 2)[:, None] + torch.arange(width, device=mask.device)
    rows = ((top + bottom) // 2)[:, None] + torch.arange(height, device=mask.device)
    batch = torch.arange(len(mask), device=mask.device)
    part = textures[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
    return images * (1 - strength) + part * strength
