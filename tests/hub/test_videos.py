import av
import numpy as np
import pytest
from PIL import Image

from pi_rl.hub.film import film_timing
from pi_rl.hub.videos import side_by_side, write_gif, write_video


def episode(length, height=24, width=32):
    frames = np.zeros((length, height, width, 3), np.uint8)
    for t in range(length):
        frames[t, :, : (t + 1) * width // length] = (200, 40, 40)
    return frames


def decoded(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return (
            stream.codec_context.name,
            stream.pix_fmt,
            [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)],
        )


def test_video_is_h264_yuv420p_with_all_frames(tmp_path):
    frames = episode(12)
    codec, pixel_format, images = decoded(write_video(frames, tmp_path / "new" / "v.mp4", fps=20))
    assert (codec, pixel_format, len(images)) == ("h264", "yuv420p", 12)
    assert np.abs(np.stack(images).astype(int) - frames).mean() < 12
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["v.mp4"]


def test_video_index_comes_first_so_that_browsers_start_at_once(tmp_path):
    content = write_video(episode(5), tmp_path / "v.mp4", fps=20).read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_odd_sizes_are_padded(tmp_path):
    _, _, images = decoded(write_video(episode(3, 25, 33), tmp_path / "v.mp4", fps=10))
    assert images[0].shape == (26, 34, 3)


def test_gif_loops_and_holds_the_last_frame(tmp_path):
    with Image.open(write_gif(episode(6), tmp_path / "v.gif", fps=10, width=16, hold_last_s=2.0)) as image:
        assert image.size == (16, 12)
        assert image.n_frames == 6
        assert image.info["loop"] == 0
        image.seek(5)
        assert image.info["duration"] == 2000


@pytest.mark.parametrize("write", [write_video, write_gif])
@pytest.mark.parametrize(
    "frames", [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3))]
)
def test_wrong_frames_are_refused(tmp_path, write, frames):
    with pytest.raises(ValueError, match="uint8"):
        write(frames, tmp_path / ("v.mp4" if write is write_video else "v.gif"), 10)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [write_video, write_gif])
def test_wrong_name_or_rate_is_refused(tmp_path, write):
    with pytest.raises(ValueError, match="ends in"):
        write(episode(2), tmp_path / "v.avi", 10)
    with pytest.raises(ValueError, match="fps"):
        write(episode(2), tmp_path / ("v.mp4" if write is write_video else "v.gif"), 0)


def test_side_by_side_shows_both_and_keeps_the_shorter_ones_end():
    before, after = episode(10), episode(4)
    frames = side_by_side(before, after, success_before=False, success_after=True, caption="press", height=48, hold=3)
    assert frames.shape[0] == 13
    assert frames.shape[1] % 2 == frames.shape[2] % 2 == 0
    middle = frames.shape[2] // 2
    assert np.array_equal(frames[4, :, middle + 3 :], frames[12, :, middle + 3 :])
    assert not np.array_equal(frames[4, :, :middle], frames[9, :, :middle])


def test_outcome_appears_only_when_the_episode_is_over():
    both = episode(6)
    won = side_by_side(both, both, success_before=True, success_after=True, hold=0)
    lost = side_by_side(both, both, success_before=False, success_after=False, hold=0)
    assert np.array_equal(won[:5], lost[:5])
    assert not np.array_equal(won[5], lost[5])


def test_side_by_side_needs_two_labels():
    with pytest.raises(ValueError, match="two"):
        side_by_side(episode(2), episode(2), success_before=True, success_after=True, labels=("one",))


@pytest.mark.parametrize(("fps", "every", "slower"), [(80, 2, 4), (20, 1, 2), (5, 1, 1), (60, 1, 6)])
def test_films_are_slow_enough_to_see_whatever_the_control_rate(fps, every, slower):
    assert film_timing(fps) == (every, slower)
