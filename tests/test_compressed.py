"""Motion, residual and I-frame of compressed clips; re-encoding; the networks with exits."""
import contextlib
import io
import json
import os
import urllib.error

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from av.codec.context import Flags2
from av.sidedata.sidedata import SideDataContainer
from av.video.frame import PictureType
from torch.utils.flop_counter import FlopCounterMode

import common
from common import BadInput, BadVideo, Clips, Coded, read_compressed, read_frames, write_video

RNG = np.random.default_rng
X264 = {"codec": "libx264", "refs": "1"}  # its default, three references, breaks the chain
CODECS = {"mpeg4": {}, "mv4": {"flags": "+mv4"}, "x264": X264}
each_codec = pytest.mark.parametrize("codec", CODECS)


def texture(height, width, seed=0, sizes=(4, 8, 16, 32)):
    """Noise with coarse parts, which a motion search follows, uint8 (height, width, 3)"""
    layers = [torch.from_numpy(RNG([seed, size]).random((1, 3, 2 + height // size,
                                                         2 + width // size))) for size in sizes]
    total = sum(F.interpolate(layer, (height, width), mode="bicubic") for layer in layers)[0]
    total = (total - total.min()) / (total.max() - total.min())
    return (30 + 195 * total.permute(1, 2, 0)).round().to(torch.uint8).numpy()


def pan(dx, dy, frames=12, height=96, width=128, seed=0, parts=1):
    """What is at p has come (dx, dy) / parts pixels since the frame before; uint8 (N, H, W, 3)"""
    ground = texture(parts * height + 320, parts * width + 320, seed,
                     (4, 8, 16, 32) if parts == 1 else (12, 24, 48))  # smooth between pixels
    return np.stack([ground[160 - t * dy:, 160 - t * dx:][:parts * height:parts,
                            :parts * width:parts] for t in range(frames)])


def sprite(dx, dy, top=20, left=12, side=40, height=96, width=128, frames=12):
    """A textured square that moves (dx, dy) a frame on still ground."""
    video = texture(height, width, 1)[None].repeat(frames, 0)
    for t in range(frames):
        y, x = top + t * dy, left + t * dx
        video[t, y:y + side, x:x + side] = texture(side, side, 2)
    return video


def motion(path, i, **options):
    """MV of frame i in pixels -> float (h, w, 2)"""
    coded = read_compressed(path, [i], pictures=False, **options)
    assert coded.intra is coded.frame is None
    return coded.motion[0].permute(1, 2, 0).numpy() / 4


def middle(mv, border):
    """Leaves out so many pixels, rounded up to whole points, at each side."""
    cut = -(-border // 4)
    return mv[cut:-cut, cut:-cut]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pairs"
    common.make_toy_folder(folder, train=24, test=24, pairs=True)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """{codec: file} of 40 frames in four groups: 20 of a fast pan, 20 of a sprite, with a cut."""
    folder = tmp_path_factory.mktemp("mixed")
    frames = np.concatenate([pan(3, -1, 20, 72, 104),
                             sprite(2, 1, 8, 8, 32, 72, 104, frames=20)])
    for name, options in CODECS.items():
        write_video(folder / f"{name}.mp4", frames, **options)
    return {name: folder / f"{name}.mp4" for name in CODECS}


# ---- motion is what moved ------------------------------------------------------------------------


@each_codec
@pytest.mark.parametrize(("dx", "dy"), [(3, 1), (-2, 3), (0, -4), (-5, -2)])
def test_pan_by_whole_pixels_is_exact(tmp_path, codec, dx, dy):
    write_video(tmp_path / "a.mp4", pan(dx, dy), **CODECS[codec])
    for t in (1, 5, 8):
        for whole in (False, True):
            mv = motion(tmp_path / "a.mp4", t, whole=whole)
            y, x = np.mgrid[2:96:4, 2:128:4]
            seen = np.minimum(y, y - t * dy) >= 20  # here and where it came from: not at a border
            seen &= (np.maximum(y, y - t * dy) < 76) & (np.minimum(x, x - t * dx) >= 20)
            seen &= np.maximum(x, x - t * dx) < 108
            assert seen.sum() > 50
            assert (mv[seen] == [t * dx, t * dy]).all()


@each_codec
@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (-1, 1), (3, -1)])
def test_pan_by_half_pixels_keeps_the_halves(tmp_path, codec, dx, dy):
    write_video(tmp_path / "a.mp4", pan(dx, dy, parts=2), **CODECS[codec])
    for t, near in ((1, 0), (11, .6)):  # encoders are a quarter or half off at times
        inside, true = middle(motion(tmp_path / "a.mp4", t), 32), np.array([t * dx, t * dy]) / 2
        assert abs(inside - true).mean((0, 1)).max() <= near
        assert (abs(np.median(inside, (0, 1)) - true) <= near).all()
    whole = middle(motion(tmp_path / "a.mp4", 11, whole=True), 32)
    assert abs(whole - true).mean((0, 1)).max() > 2


@each_codec
@pytest.mark.parametrize(("dx", "dy"), [(3, 1), (-2, 2)])
def test_sprite_moves_and_the_ground_is_still(tmp_path, codec, dx, dy):
    top, left = 20, 60 if dx < 0 else 16
    write_video(tmp_path / "a.mp4", sprite(dx, dy, top, left), **CODECS[codec])
    for t in (1, 4, 11):
        mv = motion(tmp_path / "a.mp4", t, step=1)
        inside = mv[top + t * dy + 15:top + t * dy + 25, left + t * dx + 15:left + t * dx + 25]
        assert (inside == [t * dx, t * dy]).all()
        ground = np.ones((96, 128), bool)  # blocks that the sprite never touched
        ys, xs = (sorted((at, at + t * d)) for at, d in ((top, dy), (left, dx)))
        ground[max(0, ys[0] - 16):ys[1] + 56, max(0, xs[0] - 16):xs[1] + 56] = False
        assert ground.sum() > 2000
        assert (mv[ground] == 0).all()


def test_motion_of_toy_clips_is_the_truth_to_a_pixel(pairs):
    truths, errors = json.loads((pairs / "truth.json").read_text()), []
    for path, _ in common.read_data(pairs).train:
        true = toy_motion(truths["/".join(path.split("/")[-2:])])
        at = np.mgrid[2:96:4, 2:96:4].transpose(1, 2, 0)[..., ::-1]  # (x, y)
        for t in (1, 11):
            back = at + .5
            for true_t in true[t:0:-1]:
                x, y = np.floor(back.clip(0, 95)).astype(int).transpose(2, 0, 1)
                back = back - true_t[y, x]
            far = np.hypot(*(motion(path, t) - (at + .5 - back)).transpose(2, 0, 1)) / t
            errors.append(far[true[t][at[..., 1], at[..., 0]].any(-1)].mean())
    assert np.mean(errors[::2]) < 1  # one frame
    assert np.mean(errors[1::2]) < 1  # eleven, a frame


def toy_motion(truth):
    return common.toy_clip(truth, 24, 96)[1]


# ---- the accumulation, derived anew --------------------------------------------------------------


def vectors(path, i):
    """Rows of PyAV's own reading, one array per P-frame since the last I-frame, and the size."""
    found = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.flags2 |= Flags2.export_mvs
        stream.thread_count = 1
        for at, frame in enumerate(container.decode(stream)):
            held = SideDataContainer(frame).get("MOTION_VECTORS")
            rows = [] if held is None else held.to_ndarray()
            found = [] if frame.pict_type == PictureType.I else [*found, rows]
            if at == i:
                return found, frame.height, frame.width


def blocks(rows):
    for row in rows:
        w, h = int(row["w"]), int(row["h"])
        x, y = int(row["dst_x"]) - w // 2, int(row["dst_y"]) - h // 2
        yield slice(max(0, y), y + h), slice(max(0, x), x + w), row


def slow_motion(path, i):
    """A_t(p) = A_{t-1}(p - v), forward, for every quarter of a pixel -> int (H, W, 2), quarters"""
    frames, H, W = vectors(path, i)
    y, x = start = np.mgrid[:4 * H, :4 * W]
    A = start
    for rows in frames:
        v = np.zeros((2, H, W), int)
        for ys, xs, row in blocks(rows):
            quarters = 4 // int(row["motion_scale"])
            v[0, ys, xs] = -int(row["motion_y"]) * quarters
            v[1, ys, xs] = -int(row["motion_x"]) * quarters
        v = v.repeat(4, 1).repeat(4, 2)
        A = A[:, (y - v[0]).clip(2, 4 * H - 2), (x - v[1]).clip(2, 4 * W - 2)]
    return (start - A)[::-1, 2::4, 2::4].transpose(1, 2, 0)


def coviar(path, i):
    """CoViAR's algorithm: pixel by pixel, whole vectors, unmoved where the source lies outside.
    -> int (H, W, 2) pixels, and which pixels' tracks never met the border"""
    frames, H, W = vectors(path, i)
    start = np.mgrid[:H, :W]
    A, inside = start.copy(), np.ones((H, W), bool)
    for rows in frames:
        old, was_inside = A.copy(), inside.copy()
        for ys, xs, row in blocks(rows):
            y, x = start[:, ys, xs]
            from_y = y + int(row["src_y"]) - int(row["dst_y"])
            from_x = x + int(row["src_x"]) - int(row["dst_x"])
            there = (from_y >= 0) & (from_y < H) & (from_x >= 0) & (from_x < W)
            A[:, y[there], x[there]] = old[:, from_y[there], from_x[there]]
            inside[y, x] = False
            inside[y[there], x[there]] = was_inside[from_y[there], from_x[there]]
    return (start - A)[::-1].transpose(1, 2, 0), inside


@each_codec
def test_motion_equals_a_slow_derivation(mixed, codec):
    for i in (1, 7, 19, 23, 31, 39):
        assert (4 * motion(mixed[codec], i, step=1) == slow_motion(mixed[codec], i)).all()


def test_motion_of_real_clips_equals_a_slow_derivation(shared):
    for path in sorted(shared.glob("weizmann/*/*.avi"))[::18]:
        assert (4 * motion(path, 11, step=1) == slow_motion(path, 11)).all()


@each_codec
def test_whole_vectors_are_coviars_algorithm(mixed, codec):
    for i in (1, 7, 11, 31, 39):
        mv, inside = coviar(mixed[codec], i)
        assert inside.mean() > .5
        coded = read_compressed(mixed[codec], [i], whole=True, step=1)
        assert (coded.motion[0].permute(1, 2, 0).numpy() == 4 * mv)[inside].all()
        (y, x), intra = np.mgrid[:72, :104], coded.intra[0].int().numpy()
        residual = coded.frame[0].int().numpy() - intra[:, y - mv[..., 1], x - mv[..., 0]]
        assert (common.modalities(coded, 1)[1][0].numpy() == residual)[:, inside].all()


def test_whole_pixel_motion_is_the_same_in_all_three(tmp_path):
    write_video(tmp_path / "a.mp4", pan(2, -3), **X264)
    mv, inside = coviar(tmp_path / "a.mp4", 7)
    for whole in (False, True):
        assert (motion(tmp_path / "a.mp4", 7, step=1, whole=whole) == mv)[32:-32, 32:-32].all()


@each_codec
def test_every_fourth_pixel_is_every_fourth_of_all(mixed, codec):
    for i in (7, 39):
        assert (motion(mixed[codec], i) == motion(mixed[codec], i, step=1)[2::4, 2::4]).all()


# ---- pictures, residual --------------------------------------------------------------------------


def assert_adds_up(path, indices):
    coded = read_compressed(path, indices)
    mv, r, i = common.modalities(coded)
    S, _, H, W = coded.frame.shape
    assert mv.shape == (S, 2, H, W)
    assert coded.motion.shape == (S, 2, -(-H // 4), -(-W // 4))
    assert coded.motion.dtype == torch.int16
    assert torch.equal(common.warp(i, mv).round() + r, coded.frame.float())
    assert torch.equal(i, coded.intra)
    assert i.dtype == torch.uint8
    return mv, r


@pytest.mark.parametrize(("height", "width", "codec"), [
    (50, 90, "mpeg4"), (50, 90, "x264"), (35, 45, "mv4"), (17, 131, "mpeg4"), (66, 34, "x264")])
def test_frame_is_warped_intra_and_residual_at_odd_sizes(tmp_path, height, width, codec):
    write_video(tmp_path / "a.mp4", pan(3, 2, 13, height, width), **CODECS[codec])
    _, r = assert_adds_up(tmp_path / "a.mp4", range(13))
    assert (r[[0, 12]] == 0).all()
    assert (4 * motion(tmp_path / "a.mp4", 9, step=1) == slow_motion(tmp_path / "a.mp4", 9)).all()


def test_frame_is_warped_intra_and_residual_in_toy_clips(pairs):
    for path, _ in common.read_data(pairs).test:
        _, r = assert_adds_up(path, [1, 11, 23])
        assert r.abs().mean() < 12


def test_all_weizmann_clips_read_without_re_encoding(shared):
    paths = sorted(shared.glob("weizmann/*/*.avi"))
    assert len(paths) == 90
    better = []
    for path in paths:
        found = common.p_frames(path)
        assert common.video_index(str(path)).unfit == ""
        indices = found[common.segment_indices(len(found), 2)]
        _, r = assert_adds_up(path, indices)
        coded = read_compressed(path, indices)
        better.append(r.abs().mean() / (coded.frame.float() - coded.intra).abs().mean())
    assert np.mean(better) < .9  # motion explains a part of what changes


@each_codec
def test_motion_makes_a_small_residual(mixed, codec):
    coded = read_compressed(mixed[codec], [7])
    r, still = common.modalities(coded)[1][0], coded.frame[0].float() - coded.intra[0]
    assert r[:, 16:-16, 24:-24].abs().mean() < .25 * still.abs().mean()


@each_codec
def test_one_call_gives_what_single_calls_give(mixed, codec):
    indices = [30, 5, 5, 14, 17, 12, 39, 0, 23]
    together = read_compressed(mixed[codec], indices)
    for n, i in enumerate(indices):
        for a, b in zip(read_compressed(mixed[codec], [i])[:3], together[:3], strict=True):
            assert torch.equal(a[0], b[n])
    alone = read_compressed(mixed[codec], indices, pictures=False)
    assert torch.equal(alone.motion, together.motion)
    assert together.motion[[0, 1, 3, 6]].any()


@each_codec
def test_pictures_are_those_of_read_frames(mixed, codec):
    keys = common.video_index(str(mixed[codec])).keys
    for i in (0, 7, 15, 39):
        coded = read_compressed(mixed[codec], [i])
        both = read_frames(mixed[codec], [keys[keys <= i][-1], i])
        # read_frames asks for bicubic, this for nothing: where the size stays FFmpeg takes the same
        # code for both, but does not promise it
        for a, b in zip((coded.intra[0], coded.frame[0]), both, strict=True):
            far = (a.int() - b.int()).abs()
            assert far.max() <= 2


# ---- where the chain starts ----------------------------------------------------------------------


@each_codec
def test_a_scene_cut_starts_the_chain_anew(tmp_path, codec):
    cut = np.concatenate([pan(2, 1, 5), pan(-3, 0, 6, seed=9)])
    write_video(tmp_path / "a.mp4", cut, **CODECS[codec])
    assert common.video_index(str(tmp_path / "a.mp4")).keys.tolist() == [0, 5]
    coded = read_compressed(tmp_path / "a.mp4", [5, 7, 10])
    assert torch.equal(coded.intra, coded.frame[:1].expand(3, -1, -1, -1))
    assert not coded.motion[0].any()
    for t, mv in ((2, coded.motion[1]), (5, coded.motion[2])):
        assert (middle(mv.permute(1, 2, 0), 36) == torch.tensor([-12 * t, 0])).all()


@pytest.mark.parametrize(("frames", "g", "options"), [
    (6, "1", {}), (1, "12", {}), (1, "12", X264), (6, "1", X264)])
def test_intra_frames_alone_have_neither_motion_nor_residual(tmp_path, frames, g, options):
    write_video(tmp_path / "a.mp4", pan(3, 1, frames), **{**options, "g": g})
    assert common.p_frames(tmp_path / "a.mp4").tolist() == list(range(frames))
    mv, r = assert_adds_up(tmp_path / "a.mp4", range(frames))
    assert not mv.any()
    assert not r.any()


@each_codec
def test_blocks_without_a_vector_count_as_still(tmp_path, codec):
    # what appears at once is found nowhere in the frame before
    frames = np.full((8, 96, 128, 3), 128, np.uint8)
    frames[4:, 32:64, 48:80] = texture(32, 32, 5)
    write_video(tmp_path / "a.mp4", frames, **CODECS[codec], sc_threshold="1000000000"
                if codec != "x264" else "0")
    rows = vectors(tmp_path / "a.mp4", 4)[0][-1]
    covered = np.zeros((96, 128), bool)
    for ys, xs, _ in blocks(rows):
        covered[ys, xs] = True
    assert not covered[32:64, 48:80].all()
    for t in (4, 7):
        coded = read_compressed(tmp_path / "a.mp4", [t])
        mv, r, _ = common.modalities(coded)
        assert not mv.any()
        assert r[0, :, 32:64, 48:80].abs().mean() > 15


def test_a_stream_refreshed_in_stripes_has_no_i_frame_to_start_from(tmp_path):
    # its packets call the start of each refresh a keyframe
    write_video(tmp_path / "a.mp4", pan(1, 0, 40), **X264,
                **{"x264-params": "intra-refresh=1:keyint=12"})
    with pytest.raises(BadVideo, match="re-encode it"):
        read_compressed(tmp_path / "a.mp4", [30])


def test_p_frames_are_all_but_the_intra_frames(mixed):
    assert common.p_frames(mixed["mpeg4"]).tolist() == [
        i for i in range(40) if i % 12]


# ---- what cannot be used -------------------------------------------------------------------------


def quarter_turn(path):
    """The matrix that a phone writes into the track header of an upright clip."""
    write_video(path, pan(3, 1))
    data = path.read_bytes()
    at = data.index((1 << 16).to_bytes(4, "big") + bytes(12), data.index(b"tkhd"))
    turn = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, 1 << 16, 0, -1 << 16, 0, 0))
    path.write_bytes(data[:at] + turn + data[at + 24:])


B = "B-frames"
REFUSED = {  # name: (how it is written, a word of the reason, whether the packets tell)
    "av1.mp4": ({"codec": "libsvtav1", "svtav1-params": "preset=12"}, "codec av1", True),
    "hevc.mp4": ({"codec": "libx265", "x265-params": "log-level=none"}, "codec hevc", True),
    "mjpeg.avi": ({"codec": "mjpeg", "pix_fmt": "yuvj420p"}, "codec mjpeg", True),
    "b.mp4": ({"bf": "2"}, B, True),
    "b.avi": ({"bf": "2"}, B, True),
    "b-h264.mp4": ({"codec": "libx264", "bf": "2"}, B, True),
    "b-h264.mkv": ({"codec": "libx264", "bf": "2", "refs": "1"}, B, True),
    "several.mp4": ({"codec": "libx264"}, "several frames", True),
    "several.avi": ({"codec": "libx264", "refs": "2"}, "several frames", True),
    "interlaced.mp4": ({"flags": "+ildct+ilme"}, "interlaced", False),
    "interlaced-h264.mp4": ({**X264, "flags": "+ildct+ilme"}, "interlaced", False),
    "turned.mp4": (quarter_turn, "rotated", False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_with_its_cause(tmp_path, name):
    how, reason, visible = REFUSED[name]
    if callable(how):
        how(tmp_path / name)
    else:
        write_video(tmp_path / name, pan(3, 1), **how)
    assert (reason in common.video_index(str(tmp_path / name)).unfit) == visible
    with pytest.raises(BadVideo, match=f"{reason}.*re-encode it") as caught:
        read_compressed(tmp_path / name, [5])
    assert caught.value.path == str(tmp_path / name)
    assert len(read_frames(tmp_path / name, [5])) == 1  # as RGB it can be read


@pytest.mark.parametrize(("name", "options"), [
    ("a.avi", {}), ("a.mkv", X264), ("a.h264", X264), ("a.m4v", {}), ("a.ts", X264),
    ("a.flv", {"codec": "flv"}), ("a.avi", {"codec": "h263"}), ("a.mpg", {"codec": "mpeg2video"}),
    ("qpel.mp4", {"flags": "+qpel"})])
def test_other_containers_and_codecs_with_vectors(tmp_path, name, options):
    size = (144, 176) if "h263" in options.values() else (96, 128)
    write_video(tmp_path / name, pan(3, 1, 20, *size), fps=25, **options)
    assert_adds_up(tmp_path / name, [7, 15])
    assert (4 * motion(tmp_path / name, 7, step=1) == slow_motion(tmp_path / name, 7)).all()
    assert (middle(motion(tmp_path / name, 7), 36) == [21, 7]).all()


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_real_rotated_clips_are_refused(shared, degrees):
    with pytest.raises(BadVideo, match="rotated"):
        read_compressed(shared / "odd-videos" / "decord" / f"video_{degrees}.mov", [1])


@pytest.mark.parametrize("name", ["a.mp4", "a.h264", "a.mkv"])
@pytest.mark.parametrize("profile", ["baseline", "main", "high"])
@pytest.mark.parametrize("refs", [1, 2, 4])
def test_references_are_read_from_the_stream(tmp_path, name, profile, refs):
    write_video(tmp_path / name, pan(3, 1, 6, 48, 64), codec="libx264", refs=str(refs),
                profile=profile)
    with common.open_video(tmp_path / name) as (_, stream):
        assert common._references(stream.codec_context.extradata) == refs


@pytest.mark.parametrize("extradata", [b"", b"\x67", bytes(50), b"\0\0\1\x68\xce\x38\x80"])
def test_references_of_nothing_are_unknown(extradata):
    assert common._references(extradata) is None


@pytest.mark.parametrize(("name", "codec"), [
    ("a.avi", "mpeg4"), ("a.avi", "mv4"), ("a.mkv", "mpeg4"), ("a.mkv", "x264"),
    ("a.avi", "x264")])  # a cut AVI lacks its index: a seek in it ends behind the wanted frame
def test_cut_files_read_before_the_cut_and_are_bad_behind_it(tmp_path, name, codec):
    write_video(tmp_path / "whole.avi", pan(3, 1, 40), **CODECS[codec])
    write_video(tmp_path / name, pan(3, 1, 40), **CODECS[codec])
    whole = read_compressed(tmp_path / "whole.avi", range(40))
    data, bad = (tmp_path / name).read_bytes(), 0
    for cut in (.01, .1, .3, .6, .9):
        path = tmp_path / f"{cut}-{name}"
        path.write_bytes(data[:int(cut * len(data))])
        for i in (0, 5, 20, 38):  # of a frame that is cut through decoders make up the rest
            try:
                coded = read_compressed(path, [i, i + 1])
            except BadVideo:
                bad += 1
            else:
                assert torch.equal(coded.frame[0], whole.frame[i])
                assert torch.equal(coded.motion[0], whole.motion[i])
    assert 5 < bad < 18


@each_codec
@pytest.mark.parametrize("name", ["a.avi", "a.mp4"])
def test_flipped_bytes_never_give_a_traceback(tmp_path, name, codec):
    write_video(tmp_path / name, pan(3, 1, 30, 64, 80), **CODECS[codec])
    good, rng, read = (tmp_path / name).read_bytes(), RNG(0), 0
    for i in range(45):
        data = np.frombuffer(good, np.uint8).copy()
        part = [data, data[:1500], data[-1500:]][i % 3]  # anywhere, the header, the index
        part[rng.integers(len(part), size=8)] = rng.integers(256, size=8)
        path = tmp_path / f"{i}-{name}"
        path.write_bytes(data.tobytes())
        with contextlib.suppress(BadVideo):
            found = common.p_frames(path)
            coded = read_compressed(path, found[common.segment_indices(len(found), 4)])
            assert len(common.modalities(coded)[0]) == 4
            read += 1
    assert read > 5


def test_a_size_that_changes_is_named(tmp_path):
    for size in ((48, 64), (64, 96)):
        write_video(tmp_path / "part.h264", pan(3, 1, 12, *size), **X264)
        with open(tmp_path / "two.h264", "ab") as file:
            file.write((tmp_path / "part.h264").read_bytes())
    with pytest.raises(BadVideo, match=r"size changes from \(64, 48\) to \(96, 64\)"):
        read_compressed(tmp_path / "two.h264", [20])


def test_odd_videos_are_read_or_named_with_a_reason(shared):
    read, bad = set(), {}
    for path in sorted([*shared.glob("odd-videos/*/*"), *shared.glob("clips/*")]):
        try:
            found = common.p_frames(path)
            assert_adds_up(path, found[common.segment_indices(len(found), 3)])
            read.add(path.name)
        except BadVideo as error:
            bad[path.name] = error
    assert all(error.path.endswith(name) and error.reason for name, error in bad.items())
    assert {"video_0.mov", "v_SoccerJuggling_g23_c01.avi",
            "bbb_sunflower_QCIF_30fps_mp4v_noaudio_1f.mp4"} <= read


@pytest.mark.parametrize("indices", [[40], [-1]])
def test_a_frame_that_no_file_can_have_is_an_error(mixed, indices):
    with pytest.raises(BadVideo, match="40 frames"):
        read_compressed(mixed["mpeg4"], indices)


# ---- loaders -------------------------------------------------------------------------------------


def same(a, b):
    return all(map(torch.equal, a[:3], b[:3])) and a.size == b.size


def test_coded_samples_follow_their_key(pairs):
    rows = common.read_data(pairs).train
    clips, test = (Clips(rows, 3, sampling="coded", train=train) for train in (True, False))
    a, b = clips[4, 7], clips[4, 7]
    assert isinstance(a.video, Coded)
    assert a.video.intra.shape == a.video.frame.shape == (3, 3, 96, 96)
    assert a.video.motion.shape == (3, 2, 24, 24)
    assert (a.label, a.key, a.bad) == (rows[7][1], (4, 7), [])
    assert same(a.video, b.video)
    assert not all(same(a.video, clips[epoch, 7].video) for epoch in range(4))
    assert same(test[0, 7].video, test[1, 7].video)
    # 22 P-frames, of 24; the middles of three equal parts of these
    assert same(test[0, 7].video, read_compressed(rows[7][0], [4, 11, 19]))
    assert same(test[0, 7].video,
                Clips(rows, 3, sampling="coded", train=True, jitter=False)[5, 7].video)


def test_another_clip_takes_the_place_of_a_bad_one_in_training_only(pairs, tmp_path):
    write_video(tmp_path / "b.mp4", pan(3, 1), bf="2")
    rows = [*common.read_data(pairs).train[:5], (str(tmp_path / "b.mp4"), 99)]
    taken = Clips(rows, 3, sampling="coded", train=True)[0, 5]
    assert isinstance(taken.video, Coded)
    assert taken.label != 99
    assert [path for path, _ in taken.bad] == [str(tmp_path / "b.mp4")] * len(taken.bad)
    missed = Clips(rows, 3, sampling="coded")[0, 5]
    assert missed.video is None
    assert B in missed.bad[0][1]


def test_coded_clips_pass_through_loader_processes(pairs):
    clips = Clips(common.read_data(pairs).train, 3, sampling="coded", train=True)
    here, there = (list(common.clip_loader(clips, 10, workers=workers)) for workers in (0, 2))
    assert len(here) == 2
    for a, b in zip(here, there, strict=True):
        assert a.key == b.key
        assert all(map(same, a.video, b.video))
    view = common.compressed_view(here[0].video, 32)
    assert view["mv"].shape == (10, 3, 2, 32, 32)


# ---- what the networks see -----------------------------------------------------------------------


def marked(height=48, width=64, seed=0):
    """A clip where mv, r and i carry the same random mask: (8, 4) pixels, 40 and 60 + 100 of it."""
    mask = torch.from_numpy(RNG(seed).random((2, 1, height // 4, width // 4)) < .4)
    intra = (60 + 100 * mask).repeat_interleave(4, -1).repeat_interleave(4, -2)
    intra = intra.to(torch.uint8).expand(-1, 3, -1, -1)
    still = torch.tensor([32, 16], dtype=torch.int16)[None, :, None, None] * mask
    mv = still.repeat_interleave(4, -1).repeat_interleave(4, -2) / 4
    r = 40 * mask.repeat_interleave(4, -1).repeat_interleave(4, -2)
    frame = (common.warp(intra, mv).round() + r).to(torch.uint8)
    return Coded(intra, frame, still, (height, width))


def masks(view):
    """The mask as each part of a view shows it."""
    return [view["mv"][:, :, 0] * 40 / 8, view["mv"][:, :, 1] * 40 / 4,
            view["r"][:, :, 1] * 255 / 40, (view["i"][:, :, 2] * 255 - 60) / 100]


def test_the_test_view_is_the_middle_square():
    clip = marked()
    view, (mv, r, i) = common.compressed_view([clip, clip], 48), common.modalities(clip)
    assert {name: v.shape for name, v in view.items()} == {
        "mv": (2, 2, 2, 48, 48), "r": (2, 2, 3, 48, 48), "i": (2, 2, 3, 48, 48)}
    for name, whole in (("mv", mv / 40), ("r", r / 255), ("i", i / 255)):
        assert torch.allclose(view[name][1], whole[..., 8:56], atol=1e-6)
    assert common.compressed_view([clip], 32)["mv"].shape == (1, 2, 2, 32, 32)


def test_view_ranges():
    intra, frame = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 3, 32, 32)
    intra[..., 16:], frame[..., :16] = 255, 255
    far = torch.full((1, 2, 8, 8), 160, dtype=torch.int16)
    far[:, 1], far[..., 4:] = -160, 4
    view = common.compressed_view([Coded(intra, frame.to(torch.uint8), far, (32, 32))], 32)
    assert (view["mv"].min(), view["mv"].max()) == (-.5, .5)  # 40 pixels are cut to 20
    assert torch.allclose(view["mv"][..., 31], torch.tensor(1 / 40))
    assert (view["r"].min(), view["r"].max()) == (-1, 1)
    assert (view["i"].min(), view["i"].max()) == (0, 1)


@pytest.mark.parametrize("mirror", [True, False])
def test_one_crop_and_flip_for_all_three(mirror):
    clip, signs, views = marked(), [], []
    for seed in range(40):
        view = common.compressed_view([clip], 40, [RNG(seed)], [mirror])
        across, *others = masks(view)
        signs.append(1 if across.mean() > 0 else -1)
        for other in others:
            assert torch.allclose(across * signs[-1], other, atol=1e-4)
        views.append(view["i"])
        assert torch.equal(view["i"], common.compressed_view([marked(seed=1), clip], 40, [
            RNG(99), RNG(seed)], [True, mirror])["i"][1:])  # a clip's own generator only
    assert 10 < signs.count(-1) < 30 if mirror else -1 not in signs
    assert len({tuple(view.flatten().tolist()) for view in views}) > 20  # crops differ


def test_crops_are_of_the_scales():
    # a ramp: its slope in the view is the side of the crop
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 3, 48, 64).contiguous()
    clip = Coded(ramp, ramp, torch.zeros(1, 2, 12, 16, dtype=torch.int16), (48, 64))
    sides, lefts = set(), set()
    for seed in range(60):
        row = common.compressed_view([clip], 48, [RNG(seed)], [False])["i"][0, 0, 0, 24] * 255
        sides.add(round(float(row[40] - row[8]) / 32 * 48))
        lefts.add(round(float(row[8])))
    assert sides == {36, 42, 48}
    assert len(lefts) > 12


def test_view_of_a_mirrored_clip_is_the_flip_of_its_view(mixed):
    clip = read_compressed(mixed["x264"], [7, 31])
    mirrored = Coded(clip.intra.flip(-1), clip.frame.flip(-1), clip.motion.flip(-1), clip.size)
    mirrored.motion[:, 0] *= -1
    a, b = (common.compressed_view([c], 64) for c in (clip, mirrored))
    b = {name: view.flip(-1) for name, view in b.items()}
    b["mv"][:, :, 0] *= -1
    assert torch.allclose(a["mv"], b["mv"], atol=1e-6)
    assert torch.allclose(a["i"], b["i"], atol=1e-6)
    assert (a["r"] - b["r"]).abs().max() < 1.1 / 255  # .5 is rounded the other way somewhere
    assert (a["r"] - b["r"]).abs().mean() < .01 / 255


# ---- re-encoding ---------------------------------------------------------------------------------


def assert_in_coviars_form(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.width, context.height) == ("mpeg4", 340, 256)
        kinds = [PictureType(frame.pict_type).name for frame in container.decode(stream)]
    assert set(kinds) <= {"I", "P"}
    index = common.video_index(str(path))
    assert [i for i, kind in enumerate(kinds) if kind == "I"] == index.keys.tolist()
    assert np.diff([*index.keys, index.count]).max() <= 12
    assert index.unfit == ""
    return index.count


def psnr(a, b):
    return float(10 * torch.log10(255 ** 2 / (a.float() - b.float()).square().mean()))


def resized(path, indices):
    with av.open(str(path)) as container:
        frames = [f.reformat(340, 256, "rgb24").to_ndarray() for f in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)[list(indices)]).permute(0, 3, 1, 2)


def test_a_folder_is_re_encoded_and_the_source_only_read(tmp_path, capsys):
    source, target = tmp_path / "set", tmp_path / "set-mpeg4"
    (source / "a" / "deep").mkdir(parents=True)
    made = {"a/b.mp4": (40, {"codec": "libx264", "bf": "2"}), "a/deep/c.avi": (17, {}),
            "d.mkv": (9, {"codec": "mjpeg", "pix_fmt": "yuvj420p"}), "cut.avi": (40, {})}
    for name, (frames, options) in made.items():
        write_video(source / name, pan(3, 1, frames), **options)
    data = (source / "cut.avi").read_bytes()
    (source / "cut.avi").write_bytes(data[:int(.6 * len(data))])
    quarter_turn(source / "turned.mp4")
    (source / "train1.csv").write_text("path,label\na/b.mp4,b\n")
    (source / "text.avi").write_text("These are no moving pictures.\n")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns)
              for path in source.rglob("*") if path.is_file()}

    assert common.reencode(source, workers=1) == target
    errors = capsys.readouterr().err
    listed = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
              for folder in (source, target)]
    assert listed[0] == listed[1]
    for name in ("train1.csv", "text.avi"):
        assert (target / name).read_bytes() == before[source / name][0]
    assert f"{source / 'text.avi'}: copied as it is" in errors
    assert "train1.csv" not in errors
    for name, (frames, _) in made.items():
        count = assert_in_coviars_form(target / name)
        if name == "cut.avi":
            assert 12 < count < 40
            assert f"{source / name}: damaged, only {count} of 40 frames" in errors
        else:
            assert count == frames
            assert name not in errors
        some = [0, count // 2, count - 1]
        assert psnr(read_frames(target / name, some), resized(source / name, some)) > 30
    upright = F.interpolate(read_frames(source / "turned.mp4", [5]).float(), (256, 340),
                            mode="bilinear")
    assert assert_in_coviars_form(target / "turned.mp4") == 12
    assert psnr(read_frames(target / "turned.mp4", [5]), upright) > 30

    (target / "d.mkv").unlink()
    (target / "d.mkv.part").write_text("left by a kill")
    kept = {path: path.stat().st_mtime_ns for path in target.rglob("*")
            if path.is_file() and path.name not in ("c.avi", "d.mkv.part")}
    os.utime(target / "a" / "deep" / "c.avi", (0, 0))  # older than its source
    common.reencode(source, target, workers=1)
    assert "re-encoding 2 files" in capsys.readouterr().err
    assert assert_in_coviars_form(target / "d.mkv") == 9
    assert (target / "a" / "deep" / "c.avi").stat().st_mtime > 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(target.rglob("*.part"))
    common.reencode(source, target)  # nothing is left to do
    assert capsys.readouterr().err == ""
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}


def test_folders_inside_each_other_are_refused(tmp_path):
    (tmp_path / "set" / "in").mkdir(parents=True)
    for source, target in (("set", "set/in"), ("set/in", "set"), ("set", "set"),
                           ("set", "set/in/../new")):
        with pytest.raises(BadInput, match="one lies in the other"):
            common.reencode(tmp_path / source, tmp_path / target)
    with pytest.raises(BadInput, match="no such folder"):
        common.reencode(tmp_path / "none")


def test_re_encoding_into_memory_gives_the_motion_of_the_source(tmp_path):
    frames = pan(2, 0, 8, 256, 340)
    write_video(tmp_path / "a.mp4", frames, codec="libx264", bf="2")
    memory = io.BytesIO()
    assert common.reencode_video(tmp_path / "a.mp4", memory) == (8, 0)
    (tmp_path / "b.mp4").write_bytes(memory.getvalue())
    assert assert_in_coviars_form(tmp_path / "b.mp4") == 8
    assert (np.median(middle(motion(tmp_path / "b.mp4", 6), 32), (0, 1)) == [12, 0]).all()
    with pytest.raises(BadVideo, match="no such file"):
        common.reencode_video(tmp_path / "none.mp4", io.BytesIO())


# ---- networks with exits -------------------------------------------------------------------------


def exit_net(modality="r", name="toy", classes=5, seed=0):
    torch.manual_seed(seed)
    net = common.ExitNet(modality, name, classes)
    return net.eval(), common.exit_heads(net, classes).eval()


@pytest.mark.parametrize(("modality", "name", "expected"), [
    ("mv", "resnet18", (1.084, 1.611, 2.138, 2.549)),
    ("r", "resnet18", (1.123, 1.650, 2.177, 2.588)),
    ("i", "resnet50", (1.248, 3.201, 6.517, 7.326))])
def test_cost_to_each_exit_is_that_of_the_papers_code(modality, name, expected):
    with torch.device("meta"):
        net, heads = exit_net(modality, name, 101)
        x = torch.empty(1, 1, 2 if modality == "mv" else 3, 224, 224)
    for k, most in enumerate(expected):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            logits = common.exit_logits(net, heads, x)
            for _ in range(k + 1):
                assert next(logits).shape == (1, 101)
        assert round(counter.get_total_flops() / 2e9, 3) == most


@pytest.mark.parametrize(("name", "convs", "inputs"), [
    ("resnet18", [(64, 64, 7), (128, 128, 3), (256, 256, 3)], [1024, 2048, 4096]),
    ("resnet34", [(64, 64, 7), (128, 128, 3), (256, 256, 3)], [1024, 2048, 4096]),
    *((name, [(256, 64, 3), (512, 256, 3), (1024, 1024, 3)], [1024, 4096, 16384])
      for name in ("resnet50", "wide_resnet50_2", "resnext50_32x4d"))])
def test_heads_are_those_of_the_papers_code(name, convs, inputs):
    with torch.device("meta"):
        net, heads = exit_net("i", name, 7)
    assert [[type(module).__name__ for module in head] for head in heads] == [
        ["Conv2d", "BatchNorm2d", "AdaptiveAvgPool2d", "Flatten", "Linear"]] * 3
    assert [(head[0].in_channels, head[0].out_channels, head[0].kernel_size[0])
            for head in heads] == convs
    assert [(head[4].in_features, head[4].out_features) for head in heads] == [
        (size, 7) for size in inputs]
    assert all(head[0].padding == (1, 1) and head[0].bias is None for head in heads)
    assert net(torch.empty(2, 3, 3, 64, 64, device="meta"))[1].shape == (2, 7)


@pytest.mark.parametrize(("modality", "channels"), [("mv", 2), ("r", 3), ("i", 3)])
def test_exits_are_heads_on_the_maps_and_the_mean_over_segments(modality, channels):
    net, heads = exit_net(modality)
    x = torch.rand(4, 3, channels, 64, 64)
    with torch.no_grad():
        logits, (maps, last) = list(common.exit_logits(net, heads, x)), net(x)
        alone = [torch.stack(part).mean(0) for part in zip(*(
            common.exit_logits(net, heads, x[:, s:s + 1]) for s in range(3)), strict=True)]
    assert [f.shape[:2] for f in maps] == [(12, 16), (12, 32), (12, 64)]
    assert torch.equal(logits[3], last)
    for k in range(4):
        assert logits[k].shape == (4, 5)
        assert torch.allclose(logits[k], alone[k], atol=1e-5)
        if k < 3:
            assert torch.equal(logits[k], heads[k](maps[k], 3))
            by_hand = heads[k][4](heads[k][2](heads[k][1](heads[k][0](maps[k]))).flatten(1))
            assert torch.allclose(logits[k], by_hand.view(4, 3, 5).mean(1), atol=1e-5)


def test_nothing_behind_an_exit_runs():
    net, heads = exit_net()
    ran, parts = [], {"layer1": net.layers[0], "layer2": net.layers[1], "layer3": net.layers[2],
                      "layer4": net.layers[3], "fc": net.fc, "head1": heads[0], "head2": heads[1],
                      "head3": heads[2]}
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
    logits = common.exit_logits(net, heads, torch.rand(2, 3, 3, 32, 32))
    assert ran == []
    for more in (["layer1", "head1"], ["layer2", "head2"], ["layer3", "head3"], ["layer4", "fc"]):
        ran.clear()
        next(logits)
        assert ran == more


def test_inputs_are_normalised_as_said():
    mv, r, i = (exit_net(modality)[0] for modality in ("mv", "r", "i"))
    assert [net.input and net.input.num_features for net in (mv, r, i)] == [2, 3, None]
    seen = []
    i.stem.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    i(torch.tensor([.485, .456, .406])[:, None, None].expand(1, 1, 3, 32, 32))
    assert seen[0].abs().max() < 1e-6


def test_unknown_networks_are_refused():
    for name, reason in (("resnet19", "unknown network resnet19.*toy, .*resnet18"),
                         ("mobilenet_v2", "unknown network"), ("resnet", "unknown network")):
        with pytest.raises(BadInput, match=reason):
            common.ExitNet("r", name, 5)
    with pytest.raises(BadInput, match="no ImageNet weights"):
        common.ExitNet("r", "toy", 5, imagenet=True)


def test_imagenet_weights_without_a_network_are_asked_for(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(BadInput) as caught:
        common.ExitNet("r", "resnet18", 5, imagenet=True)
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    assert url in str(caught.value)
    assert str(tmp_path / "checkpoints") in str(caught.value)


@pytest.mark.parametrize("modality", ["mv", "r", "i"])
def test_imagenet_weights_load_but_for_the_ends(tmp_path, monkeypatch, modality):
    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    name = torchvision.models.ResNet18_Weights.DEFAULT.url.split("/")[-1]
    torch.save(state, tmp_path / "checkpoints" / name)
    net = common.ExitNet(modality, "resnet18", 5, imagenet=True)
    fresh = common.ExitNet(modality, "resnet18", 5)
    assert set(net.state_dict()) == set(fresh.state_dict())
    assert net.fc.weight.shape == (5, 512)
    assert net.stem[0].weight.shape[1] == (2 if modality == "mv" else 3)
    if modality != "mv":
        assert torch.equal(net.stem[0].weight, state["conv1.weight"])
    for k, layer in enumerate(net.layers):
        for key, value in layer.state_dict().items():
            assert torch.equal(value, state[f"layer{k + 1}.{key}"])


def test_without_pictures_the_view_is_that_of_the_motion(mixed):
    for path in mixed.values():
        whole, motion = (common.compressed_view([read_compressed(path, [7, 31], pictures=p)], 32)
                         for p in (True, False))
        assert list(motion) == ["mv"]
        assert torch.equal(whole["mv"], motion["mv"])
