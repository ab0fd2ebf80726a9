"""Motion, residual and I-frame of compressed clips; re-encoding; the networks with exits."""
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
from av.video.reformatter import Colorspace
from torch.utils.flop_counter import FlopCounterMode

import common
from common import (
    BadInput,
    BadVideo,
    CompressedDataset,
    CompressedVideo,
    read_compressed,
    read_frames,
    write_video,
)

RNG = np.random.default_rng
CODECS = {"mpeg4": {}, "mv4": {"flags": "+mv4"}}  # a vector per 16 pixels, or per 8 where it helps
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


def motion(path, i):
    """MV of frame i in pixels, at every 4th pixel -> float (h, w, 2)"""
    coded = read_compressed(path, [i], pixels=False)
    assert coded.i_frames is coded.frames is None
    return coded.motion_qpel[0].permute(1, 2, 0).numpy() / 4


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """{codec: file} of 40 frames in four groups: 20 of a fast pan, 20 of a sprite, with a cut."""
    folder = tmp_path_factory.mktemp("mixed")
    moving = sprite(2, 1, 8, 8, 32, 72, 104, frames=20)
    for name, options in CODECS.items():
        write_video(folder / f"{name}.mp4", np.concatenate([pan(3, -1, 20, 72, 104), moving]),
                    **options)
    return {name: folder / f"{name}.mp4" for name in CODECS}


# ---- motion is what moved ------------------------------------------------------------------------


@each_codec
@pytest.mark.parametrize(("dx", "dy"), [(3, 1), (-5, -2)])
def test_pan_by_whole_pixels_is_exact(tmp_path, codec, dx, dy):
    write_video(tmp_path / "a.mp4", pan(dx, dy), **CODECS[codec])
    y, x = np.mgrid[2:96:4, 2:128:4]
    for t in (1, 5, 8):
        seen = np.minimum(y, y - t * dy) >= 20  # here and where it came from: not at a border
        seen &= (np.maximum(y, y - t * dy) < 76) & (np.minimum(x, x - t * dx) >= 20)
        seen &= np.maximum(x, x - t * dx) < 108
        assert seen.sum() > 50
        assert (motion(tmp_path / "a.mp4", t)[seen] == [t * dx, t * dy]).all()


def test_pan_by_half_pixels_keeps_the_halves(tmp_path):
    write_video(tmp_path / "a.mp4", pan(3, -1, parts=2))
    for t, near in ((1, 0), (11, .6)):  # encoders are a quarter or half off at times
        inside = motion(tmp_path / "a.mp4", t)[8:-8, 8:-8]
        assert abs(inside - [1.5 * t, -.5 * t]).mean((0, 1)).max() <= near


@each_codec
@pytest.mark.parametrize(("dx", "dy"), [(3, 1), (-2, 2)])
def test_sprite_moves_and_the_ground_is_still(tmp_path, codec, dx, dy):
    top, left = 20, 60 if dx < 0 else 16
    write_video(tmp_path / "a.mp4", sprite(dx, dy, top, left), **CODECS[codec])
    for t in (1, 4, 11):
        mv = motion(tmp_path / "a.mp4", t).repeat(4, 0).repeat(4, 1)
        inside = mv[top + t * dy + 15:top + t * dy + 25, left + t * dx + 15:left + t * dx + 25]
        assert (inside == [t * dx, t * dy]).all()
        ground = np.ones((96, 128), bool)  # blocks that the sprite never touched
        ys, xs = (sorted((at, at + t * d)) for at, d in ((top, dy), (left, dx)))
        ground[max(0, ys[0] - 16):ys[1] + 56, max(0, xs[0] - 16):xs[1] + 56] = False
        assert ground.sum() > 2000
        assert (mv[ground] == 0).all()


def test_motion_of_toy_clips_is_the_truth_to_a_pixel(coded):
    truths, errors = json.loads((coded / "toy_attributes.json").read_text()), []
    for path, _ in common.load_dataset(coded).train:
        truth = truths["/".join(path.split("/")[-2:])]
        direction = np.array(common.MOTIONS[truth["motion"]])
        for t in (1, 11):  # at the middle of the object, which is still when it grows
            at = np.array([truth["x"], truth["y"]]) + (t / 23 - .5) * .5 * truth["speed"] \
                * direction[:2]
            x, y = (96 * at / 4).astype(int)
            moved = 96 * .5 * truth["speed"] * direction[:2] * t / 23
            errors.append(np.hypot(*(motion(path, t)[y, x] - moved)) / t)
    assert np.median(errors) < .5
    assert np.mean(errors) < 1


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
    """A_t(p) = A_{t-1}(p - v), forward, for every quarter of a pixel -> int (h, w, 2), quarters"""
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
    y, x = (np.minimum(np.arange(2, size + 2, 4), size - 1) for size in (H, W))  # every 4th pixel
    return (start - A)[::-1, 4 * y[:, None] + 2, 4 * x + 2].transpose(1, 2, 0)


@each_codec
def test_motion_equals_a_slow_derivation(mixed, codec):
    for i in (1, 7, 19, 23, 31, 39):
        assert (4 * motion(mixed[codec], i) == slow_motion(mixed[codec], i)).all()


# ---- pictures, residual --------------------------------------------------------------------------


def adds_up(path, indices):
    """F = round(warp(i, mv)) + r, exactly. -> what was read, mv and r"""
    coded = read_compressed(path, indices)
    mv, r, i = common.split_modalities(coded)
    S, _, H, W = coded.frames.shape
    assert mv.shape == (S, 2, H, W)
    assert coded.motion_qpel.shape == (S, 2, -(-H // 4), -(-W // 4))
    assert torch.equal(common.warp(i, mv).round() + r, coded.frames.float())
    assert torch.equal(i, coded.i_frames)
    return coded, mv, r


@pytest.mark.parametrize(("name", "height", "width", "options"), [
    ("a.avi", 50, 90, {}), ("a.mkv", 35, 45, {"flags": "+mv4"}), ("a.ts", 17, 131, {}),
    ("quarters.mp4", 96, 128, {"flags": "+qpel"})])
def test_frame_is_warped_intra_and_residual(tmp_path, name, height, width, options):
    write_video(tmp_path / name, pan(3, 2, 13, height, width), 25, "mpeg4", **options)
    _, _, r = adds_up(tmp_path / name, range(13))
    assert (r[[0, 12]] == 0).all()
    assert (4 * motion(tmp_path / name, 9) == slow_motion(tmp_path / name, 9)).all()


def test_all_weizmann_clips_read_without_re_encoding(shared):
    paths, better = sorted(shared.glob("weizmann/*/*.avi")), []
    assert len(paths) == 90
    for path in paths:
        found = common.p_frame_indices(path)
        coded, _, r = adds_up(path, found[common.tsn_indices(len(found), 2)])
        better.append(r.abs().mean() / (coded.frames.float() - coded.i_frames).abs().mean())
    assert np.mean(better) < .9  # motion explains a part of what changes
    assert (4 * motion(paths[40], 11) == slow_motion(paths[40], 11)).all()


@each_codec
def test_one_call_gives_what_single_calls_give(mixed, codec):
    indices = [30, 5, 5, 14, 17, 12, 39, 0, 23]
    together = read_compressed(mixed[codec], indices)
    keys = common.index_video(str(mixed[codec])).keyframes
    for n, i in enumerate(indices):
        for a, b in zip(read_compressed(mixed[codec], [i])[:3], together[:3], strict=True):
            assert torch.equal(a[0], b[n])
        both = read_frames(mixed[codec], [keys[keys <= i][-1], i])
        # that function asks for bicubic, this one for nothing: FFmpeg does not promise the same
        assert (both[0].int() - together.i_frames[n].int()).abs().max() <= 2
        assert (both[1].int() - together.frames[n].int()).abs().max() <= 2
    alone = read_compressed(mixed[codec], indices, pixels=False)
    assert torch.equal(alone.motion_qpel, together.motion_qpel)
    assert together.motion_qpel[[0, 1, 3, 6]].any()
    assert common.p_frame_indices(mixed[codec]).tolist() == np.setdiff1d(range(40), keys).tolist()


# ---- where the chain starts ----------------------------------------------------------------------


def test_a_scene_cut_starts_the_chain_anew(tmp_path):
    write_video(tmp_path / "a.mp4", np.concatenate([pan(2, 1, 5), pan(-3, 0, 6, seed=9)]))
    assert common.index_video(str(tmp_path / "a.mp4")).keyframes.tolist() == [0, 5]
    coded = read_compressed(tmp_path / "a.mp4", [5, 7, 10])
    assert torch.equal(coded.i_frames, coded.frames[:1].expand(3, -1, -1, -1))
    assert not coded.motion_qpel[0].any()
    for t, mv in ((2, coded.motion_qpel[1]), (5, coded.motion_qpel[2])):
        assert (mv[:, 9:-9, 9:-9] == torch.tensor([-12 * t, 0])[:, None, None]).all()


@pytest.mark.parametrize("frames", [1, 6])
def test_intra_frames_alone_have_neither_motion_nor_residual(tmp_path, frames):
    write_video(tmp_path / "a.mp4", pan(3, 1, frames), g="1")
    assert common.p_frame_indices(tmp_path / "a.mp4").tolist() == list(range(frames))
    _, mv, r = adds_up(tmp_path / "a.mp4", range(frames))
    assert not mv.any()
    assert not r.any()


@each_codec
def test_blocks_without_a_vector_count_as_still(tmp_path, codec):
    # what appears at once is found nowhere in the frame before
    frames = np.full((8, 96, 128, 3), 128, np.uint8)
    frames[4:, 32:64, 48:80] = texture(32, 32, 5)
    write_video(tmp_path / "a.mp4", frames, **CODECS[codec], sc_threshold="1000000000")
    covered = np.zeros((96, 128), bool)
    for ys, xs, _ in blocks(vectors(tmp_path / "a.mp4", 4)[0][-1]):
        covered[ys, xs] = True
    assert not covered[32:64, 48:80].all()
    mv, r, _ = common.split_modalities(read_compressed(tmp_path / "a.mp4", [4, 7]))
    assert not mv.any()
    assert r[:, :, 32:64, 48:80].abs().mean() > 15


# ---- what cannot be used -------------------------------------------------------------------------


def quarter_turn(path):
    """The matrix that a phone writes into the track header of an upright clip."""
    write_video(path, pan(3, 1))
    data = path.read_bytes()
    at = data.index((1 << 16).to_bytes(4, "big") + bytes(12), data.index(b"tkhd"))
    turn = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, 1 << 16, 0, -1 << 16, 0, 0))
    path.write_bytes(data[:at] + turn + data[at + 24:])


REFUSED = {  # name: (how it is written, a word of the reason, whether the packets tell)
    "h264.mp4": ({"codec": "libx264"}, "codec is h264", True),
    "mpeg2.mpg": ({"codec": "mpeg2video", "fps": 25}, "codec is mpeg2video", True),
    "b.mp4": ({"bf": "2"}, "B-frames", True), "b.avi": ({"bf": "2"}, "B-frames", True),
    "interlaced.mp4": ({"flags": "+ildct+ilme"}, "interlaced", False),
    "turned.mp4": (None, "rotated", False)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_with_its_cause(tmp_path, name):
    how, reason, visible = REFUSED[name]
    write_video(tmp_path / name, pan(3, 1), **how) if how else quarter_turn(tmp_path / name)
    assert (reason in common.index_video(str(tmp_path / name)).unsupported) == visible
    with pytest.raises(BadVideo, match=f"{reason}.*re-encode it"):
        read_compressed(tmp_path / name, [5])
    assert len(read_frames(tmp_path / name, [5])) == 1  # as RGB it can be read


# ---- re-encoding ---------------------------------------------------------------------------------


def assert_in_coviars_form(path, count):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.width, context.height) == ("mpeg4", 340, 256)
        kinds = [PictureType(frame.pict_type).name for frame in container.decode(stream)]
    index = common.index_video(str(path))
    assert len(kinds) == index.num_frames == count
    assert set(kinds) <= {"I", "P"}
    assert [i for i, kind in enumerate(kinds) if kind == "I"] == index.keyframes.tolist()
    assert np.diff([*index.keyframes, count]).max() <= 12
    assert index.unsupported == ""


def psnr(a, b):
    return float(10 * torch.log10(255 ** 2 / (a.float() - b.float()).square().mean()))


def resized(path):
    """What a plain loop decodes, in CoViAR's size -> uint8 (N, 3, 256, 340)"""
    with av.open(str(path), metadata_errors="replace") as container:
        frames = [f.reformat(340, 256, "rgb24").to_ndarray() for f in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("name", "options"), [
    ("a.mp4", {"codec": "libx264", "bf": "2"}), ("b.avi", {"bf": "2"}), ("c.m4v", {}),
    ("d.mkv", {"codec": "mjpeg", "pix_fmt": "yuvj420p"})])
def test_a_copy_has_every_frame_in_its_order(tmp_path, name, options):
    write_video(tmp_path / name, pan(3, 2, 40), **options)
    common.reencode(tmp_path / name, tmp_path / "copy.mp4")
    assert_in_coviars_form(tmp_path / "copy.mp4", 40)
    copy, source = read_frames(tmp_path / "copy.mp4", range(40)), resized(tmp_path / name)
    for i in range(40):
        assert psnr(copy[i], source[i]) > max(30, psnr(copy[i], source[i - 1]) + 5)


def test_copies_of_hmdb51_have_the_frames_of_a_plain_loop(shared, tmp_path):
    for path in shared.glob("clips/*_f_*.avi"):
        source = resized(path)
        copy = read_frames(common.reencoded_copy(path, tmp_path), range(len(source)))
        assert psnr(copy, source) > 33
        assert_in_coviars_form(common.reencoded_copy(path, tmp_path), len(source))


def test_a_copy_carries_rotation_out(tmp_path):
    quarter_turn(tmp_path / "turned.mp4")
    common.reencode(tmp_path / "turned.mp4", tmp_path / "upright.mp4")
    assert_in_coviars_form(tmp_path / "upright.mp4", 12)
    upright = F.interpolate(read_frames(tmp_path / "turned.mp4", [5]).float(), (256, 340),
                            mode="bilinear")
    assert psnr(read_frames(tmp_path / "upright.mp4", [5]), upright) > 30


@pytest.mark.parametrize(("space", "full"), [(Colorspace.ITU709, 1), (Colorspace.ITU709, 2),
                                             (Colorspace.ITU601, 2), (Colorspace.BT2020, 1)])
def test_a_copy_keeps_the_colours(tmp_path, space, full):
    y, x = np.mgrid[:256, :340]
    picture = np.stack([x * 255 // 340, y, 255 - x * y * 255 // (340 * 256)], 2).astype(np.uint8)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", 25, {"qp": "4"})
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = space, full
        frame = av.VideoFrame.from_ndarray(picture)
        container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=space,
                                                   dst_color_range=full)))
        container.mux(stream.encode(None))
    common.reencode(tmp_path / "a.mp4", tmp_path / "copy.mp4")
    source, copy = (read_frames(tmp_path / name, [0]).float() for name in ("a.mp4", "copy.mp4"))
    assert (source[0].permute(1, 2, 0) - torch.from_numpy(picture)).abs().mean() < 2
    assert (copy - source).abs().mean() < 2  # untagged copies: 7 to 9


def test_copies_are_made_once_and_whole(tmp_path):
    (tmp_path / "set" / "wave").mkdir(parents=True)
    source, copies = tmp_path / "set" / "wave" / "a.mp4", tmp_path / "copies"
    write_video(source, pan(3, 1, 14), codec="libx264")
    before = source.stat().st_mtime_ns
    rows = [(str(source), 0)]
    clip = CompressedDataset(rows, 3, copies)[0, 0].video
    copy = common.reencoded_copy(source, copies)
    found = common.p_frame_indices(copy)
    assert torch.equal(clip.frames, read_compressed(copy, found[[1, 5, 9]]).frames)
    made = os.stat(copy).st_mtime_ns
    assert common.reencoded_copy(source, copies) == copy
    assert os.stat(copy).st_mtime_ns == made
    os.utime(copy, (0, 0))  # older than its source
    assert os.stat(common.reencoded_copy(source, copies)).st_mtime > 0
    data = source.read_bytes()
    for name, content in (("b.mp4", data[:len(data) // 2]), ("c.avi", b"no video")):
        source.with_name(name).write_bytes(content)
        with pytest.raises(BadVideo):
            common.reencoded_copy(source.with_name(name), copies)
        bad = CompressedDataset([(str(source.with_name(name)), 0)], 3, copies)[0, 0]
        assert (bad.label, bad.undecodable[0][0]) == (-1, str(source.with_name(name)))
    assert [str(path) for path in copies.rglob("*.*")] == [copy]  # no parts, no damaged copies
    assert source.stat().st_mtime_ns == before


# ---- loaders -------------------------------------------------------------------------------------


def same(a, b):
    return all(map(torch.equal, a[:3], b[:3])) and a.size == b.size


def test_coded_samples_follow_their_key(coded):
    rows = common.load_dataset(coded).train
    clips, test = (CompressedDataset(rows, 3, train=train) for train in (True, False))
    drawn = clips[4, 7]
    assert drawn.video.i_frames.shape == drawn.video.frames.shape == (3, 3, 96, 96)
    assert drawn.video.motion_qpel.shape == (3, 2, 24, 24)
    assert (drawn.label, drawn.rng_key, drawn.undecodable) == (rows[7][1], (4, 7), [])
    assert same(drawn.video, clips[4, 7].video)
    assert not all(same(drawn.video, clips[epoch, 7].video) for epoch in range(4))
    # 22 P-frames, of 24; the middles of three equal parts of these
    assert same(test[0, 7].video, read_compressed(rows[7][0], [4, 11, 19]))
    assert same(test[0, 7].video, test[1, 7].video)


def test_coded_clips_pass_through_loader_processes_and_bad_ones_are_replaced(coded, tmp_path):
    write_video(tmp_path / "b.mp4", pan(3, 1), bf="2")
    rows = [*common.load_dataset(coded).train[:5], (str(tmp_path / "b.mp4"), 99)]
    clips, test = (CompressedDataset(rows, 3, train=train) for train in (True, False))
    loader = common.VideoLoader(clips, 6, workers=2)
    (here,), (there,) = list(common.VideoLoader(clips, 6)), list(loader)
    assert here.rng_key == there.rng_key
    assert all(map(same, here.video, there.video))
    assert 99 not in here.label
    assert "B-frames" in loader.undecodable[str(tmp_path / "b.mp4")]
    missed = test[0, 5]
    assert missed.label == -1
    assert common.compressed_inputs([missed.video, test[0, 0].video], 32)["mv"].shape[0] == 2
    assert not common.compressed_inputs([missed.video], 32)["i"].any()


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
    return CompressedVideo(intra, frame, still, (height, width))


def test_the_test_view_is_the_middle_square():
    clip = marked()
    view, (mv, r, i) = common.compressed_inputs([clip, clip], 48), common.split_modalities(clip)
    for name, whole in (("mv", mv / 40), ("r", r / 255), ("i", i / 255)):
        assert torch.allclose(view[name][1], whole[..., 8:56], atol=1e-6)
    alone = common.compressed_inputs([clip._replace(i_frames=None, frames=None)], 48)
    assert list(alone) == ["mv"]
    assert torch.equal(alone["mv"][0], view["mv"][0])


def test_view_ranges():
    intra, frame = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 3, 32, 32)
    intra[..., 16:], frame[..., :16] = 255, 255
    far = torch.full((1, 2, 8, 8), 160, dtype=torch.int16)
    far[:, 1], far[..., 4:] = -160, 4
    video = CompressedVideo(intra, frame.to(torch.uint8), far, (32, 32))
    view = common.compressed_inputs([video], 32)
    assert (view["mv"].min(), view["mv"].max()) == (-.5, .5)  # 40 pixels are cut to 20
    assert torch.allclose(view["mv"][..., 31], torch.tensor(1 / 40))
    assert (view["r"].min(), view["r"].max()) == (-1, 1)
    assert (view["i"].min(), view["i"].max()) == (0, 1)


@pytest.mark.parametrize("mirror", [True, False])
def test_one_crop_and_flip_for_all_three(mirror):
    clip, flips, views = marked(), 0, set()
    for seed in range(40):
        view = common.compressed_inputs([clip], 40, [RNG(seed)], [mirror])
        across, down = view["mv"][:, :, 0] * 5, view["mv"][:, :, 1] * 10
        flips += bool(across.mean() < 0)
        sign = -1 if across.mean() < 0 else 1
        for mask in (down, view["r"][:, :, 1] * 255 / 40, (view["i"][:, :, 2] * 255 - 60) / 100):
            assert torch.allclose(across * sign, mask, atol=1e-4)
        views.add(tuple(view["i"].flatten().tolist()))
        both = common.compressed_inputs([marked(seed=1), clip], 40, [RNG(99), RNG(seed)],
                                      [True, mirror])
        assert torch.equal(view["i"], both["i"][1:])  # a clip's own generator only
    assert 10 < flips < 30 if mirror else not flips
    assert len(views) > 20  # crops differ


def test_crops_are_of_the_scales():
    # a ramp: its slope in the view is the side of the crop
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 3, 48, 64).contiguous()
    clip = CompressedVideo(ramp, ramp, torch.zeros(1, 2, 12, 16, dtype=torch.int16), (48, 64))
    sides, lefts = set(), set()
    for seed in range(60):
        row = common.compressed_inputs([clip], 48, [RNG(seed)], [False])["i"][0, 0, 0, 24] * 255
        sides.add(round(float(row[40] - row[8]) / 32 * 48))
        lefts.add(round(float(row[8])))
    assert sides == {36, 42, 48}
    assert len(lefts) > 12


# ---- networks with exits -------------------------------------------------------------------------


def exit_net(modality="r", name="toy", classes=5):
    torch.manual_seed(0)
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
    ("resnet50", [(256, 64, 3), (512, 256, 3), (1024, 1024, 3)], [1024, 4096, 16384])])
def test_heads_are_those_of_the_papers_code(name, convs, inputs):
    with torch.device("meta"):
        net, heads = exit_net("i", name, 7)
    for head, conv, size in zip(heads, convs, inputs, strict=True):
        assert [type(module).__name__ for module in head] == [
            "Conv2d", "BatchNorm2d", "AdaptiveAvgPool2d", "Flatten", "Linear"]
        assert (head[0].in_channels, head[0].out_channels, head[0].kernel_size[0]) == conv
        assert head[0].padding == (1, 1)
        assert head[0].bias is None
        assert (head[4].in_features, head[4].out_features) == (size, 7)
    assert net(torch.empty(2, 3, 3, 64, 64, device="meta"))[1].shape == (2, 7)


@pytest.mark.parametrize(("modality", "channels"), [("mv", 2), ("r", 3), ("i", 3)])
def test_exits_are_heads_on_the_maps_and_the_mean_over_segments(modality, channels):
    net, heads = exit_net(modality)
    x = torch.rand(4, 3, channels, 64, 64)
    with torch.no_grad():
        logits, (maps, last) = list(common.exit_logits(net, heads, x)), net(x)
        parts = [list(common.exit_logits(net, heads, x[:, s:s + 1])) for s in range(3)]
    assert torch.equal(logits[3], last)
    for k in range(4):
        alone = torch.stack([part[k] for part in parts]).mean(0)
        assert torch.allclose(logits[k], alone, atol=1e-5)
    for head, f, got in zip(heads, maps, logits[:3], strict=True):
        each = torch.nn.Sequential(*head)(f)  # a segment at a time
        assert torch.allclose(got, each.view(4, 3, 5).mean(1), atol=1e-5)


def test_nothing_behind_an_exit_runs():
    net, heads = exit_net()
    ran, parts = [], {"head1": heads[0], "head2": heads[1], "head3": heads[2], "fc": net.fc}
    parts |= {f"layer{k + 1}": layer for k, layer in enumerate(net.layers)}
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
    assert [net.input_norm and net.input_norm.num_features for net in (mv, r, i)] == [2, 3, None]
    seen = []
    i.stem.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    i(torch.tensor([.485, .456, .406])[:, None, None].expand(1, 1, 3, 32, 32))
    assert seen[0].abs().max() < 1e-6


def test_imagenet_weights(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    for name in ("resnet19", "mobilenet_v2"):
        with pytest.raises(BadInput, match=f"{name}.*resnet18"):
            common.ExitNet("r", name, 5, imagenet=True)
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    with pytest.raises(BadInput, match=f"{url}.*{tmp_path}.checkpoints"):
        common.ExitNet("r", "resnet18", 5, imagenet=True)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "checkpoints" / url.split("/")[-1])
    for modality, channels in (("mv", 2), ("i", 3)):
        net = common.ExitNet(modality, "resnet18", 5, imagenet=True)
        assert net.fc.weight.shape == (5, 512)
        assert net.stem[0].weight.shape[1] == channels
        assert channels == 2 or torch.equal(net.stem[0].weight, state["conv1.weight"])
        for key, value in net.layers[1].state_dict().items():
            assert torch.equal(value, state[f"layer2.{key}"])
