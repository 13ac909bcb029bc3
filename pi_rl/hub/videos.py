"""Videos of episodes: H.264 files for the browser, side-by-side comparisons with captions, GIFs for a README.

Frames are uint8 arrays (T, H, W, 3), RGB. PyAV's wheels carry libx264, so no system codec is needed.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Frames = NDArray[np.uint8]

_BACKGROUND = (24, 27, 33)
_TEXT = (236, 239, 244)
_MUTED = (150, 158, 170)
# Blue and orange of the Okabe-Ito palette, told apart with every kind of colour blindness.
_SUCCESS = (86, 180, 233)
_FAILURE = (230, 159, 0)


def write_video(frames: Frames, path: str | Path, fps: float, *, quality: int = 18) -> Path:
    """Write an MP4 that browsers play: H.264, yuv420p, index at the front.

    Odd heights or widths are padded by one repeated row or column because yuv420p halves both.

    Args:
        frames: (T, H, W, 3) uint8, T >= 1.
        path: File to write, ending in ``.mp4``; it appears only when complete, and nothing is left of a failed one.
        fps: Frames per second, positive.
        quality: Constant rate factor of x264: 0 lossless … 51 worst.

    Returns:
        The file written.

    Raises:
        ValueError: If the frames, the frame rate or the file name do not fit.
        OSError: If the file cannot be written.
    """
    import av

    frames = _checked(frames)
    file = Path(path)
    if file.suffix != ".mp4":
        raise ValueError(f"write_video got {file.name}; give a file name that ends in .mp4.")
    _check_fps(fps)
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    options = {"movflags": "+faststart"}
    with _complete_or_absent(file) as partial, av.open(str(partial), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(quality), "preset": "medium", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return file


def write_gif(
    frames: Frames, path: str | Path, fps: float, *, width: int | None = None, hold_last_s: float = 1.0
) -> Path:
    """Write a looping GIF, with one palette for all frames so that the file stays small.

    Args:
        frames: (T, H, W, 3) uint8, T >= 1.
        path: File to write, ending in ``.gif``; it appears only when complete, and nothing is left of a failed one.
        fps: Frames per second; GIF stores hundredths of a second and players cap at 50.
        width: Scale to this width in pixels, keeping the proportions.
        hold_last_s: How long the last frame stays, in seconds.

    Returns:
        The file written.

    Raises:
        ValueError: If the frames, the frame rate or the file name do not fit.
        OSError: If the file cannot be written.
    """
    frames = _checked(frames)
    file = Path(path)
    if file.suffix != ".gif":
        raise ValueError(f"write_gif got {file.name}; give a file name that ends in .gif.")
    _check_fps(fps)
    images = [Image.fromarray(frame) for frame in frames]
    if width is not None:
        size = (width, round(width * frames.shape[1] / frames.shape[2]))
        images = [image.resize(size, Image.Resampling.LANCZOS) for image in images]
    # The palette is taken from a sheet of the first, middle and last frame, so that no late colour is missing.
    sheet = Image.fromarray(np.concatenate([np.asarray(images[i]) for i in (0, len(images) // 2, -1)]))
    palette = sheet.quantize(colors=255, method=Image.Quantize.MEDIANCUT)
    indexed = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [max(20, round(1000 / fps))] * len(indexed)
    durations[-1] = max(durations[-1], round(1000 * hold_last_s))
    with _complete_or_absent(file) as partial:
        indexed[0].save(
            partial, save_all=True, append_images=indexed[1:], duration=durations, loop=0, optimize=False, disposal=1
        )
    return file


@contextmanager
def _complete_or_absent(file: Path) -> Iterator[Path]:
    """Gives a path beside the file; what is written there becomes the file, or is removed after an error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.stem}.partial{file.suffix}")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def side_by_side(
    before: Frames,
    after: Frames,
    *,
    success_before: bool,
    success_after: bool,
    labels: Sequence[str] = ("before: SFT", "after: SFT + RL"),
    caption: str = "",
    height: int = 320,
    hold: int = 20,
    steps_per_frame: int = 1,
) -> Frames:
    """Two episodes from the same initial state next to each other, with captions.

    Frame t of either side is the observation after t * steps_per_frame environment steps. The shorter episode keeps
    its last frame.
    The header of each side names the policy, the step count and, once the episode is over, success or failure.

    Args:
        before: (T1, H, W, 3) uint8 frames of the first policy.
        after: (T2, H, W, 3) uint8 frames of the second policy.
        success_before: Whether the first episode ended in success.
        success_after: Whether the second did.
        labels: Heading of the two sides.
        caption: Line below, for example the task instruction.
        height: Height of each picture in pixels; pictures are scaled to it.
        steps_per_frame: Environment steps between frames, for the step count.
        hold: Number of times the last picture is repeated, to read the outcome.

    Returns:
        (max(T1, T2) + hold, H', W', 3) uint8 with even H' and W'.

    Raises:
        ValueError: If frames are not uint8 RGB or there are not two labels.
    """
    if len(labels) != 2:
        raise ValueError(f"side_by_side got {len(labels)} labels; give two.")
    sides = [_scaled(_checked(frames), height) for frames in (before, after)]
    outcomes = (success_before, success_after)
    return np.stack(
        [
            _compose(sides, outcomes, labels, caption, frame, steps_per_frame)
            for frame in range(max(len(side) for side in sides) + max(0, hold))
        ]
    )


def _compose(
    sides: list[list[Image.Image]],
    outcomes: Sequence[bool],
    labels: Sequence[str],
    caption: str,
    frame: int,
    steps: int,
) -> Frames:
    """One picture of the comparison."""
    width, height = sides[0][0].width + sides[1][0].width, sides[0][0].height
    size = max(12, height // 18)
    font = ImageFont.load_default(size)
    header, footer, gap = 2 * size + 14, (size + 14 if caption else 0), 6
    canvas_size = (_even(width + gap), _even(header + height + footer))
    canvas = Image.new("RGB", canvas_size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    left = 0
    for side, success, label in zip(sides, outcomes, labels, strict=True):
        last = len(side) - 1
        over = frame >= last
        right = left + side[0].width
        canvas.paste(side[min(frame, last)], (left, header))
        draw.text((left + 8, 5), label, font=font, fill=_TEXT)
        draw.text((left + 8, size + 8), f"step {steps * min(frame, last)}", font=font, fill=_MUTED)
        if over:
            colour = _SUCCESS if success else _FAILURE
            draw.text((right - 8, size + 8), "success" if success else "failure", font=font, fill=colour, anchor="ra")
            draw.rectangle((left, header, right - 1, header + height - 1), outline=colour, width=max(3, height // 100))
        left = right + gap
    if caption:
        draw.text((8, header + height + 5), caption, font=font, fill=_MUTED)
    return np.asarray(canvas)


def _scaled(frames: Frames, height: int) -> list[Image.Image]:
    width = _even(round(frames.shape[2] * height / frames.shape[1]))
    images = (Image.fromarray(frame) for frame in frames)
    return [image.resize((width, height), Image.Resampling.BICUBIC) for image in images]


def _even(value: int) -> int:
    return value + value % 2


def _checked(frames: Frames) -> Frames:
    array = np.asarray(frames)
    if array.ndim != 4 or array.shape[0] == 0 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"Frames have shape {array.shape} and type {array.dtype}; give a uint8 array (T, H, W, 3) with T >= 1."
        )
    return array


def _check_fps(fps: float) -> None:
    if fps <= 0:
        raise ValueError(f"fps={fps}; give a positive number of frames per second.")
