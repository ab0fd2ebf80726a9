"""Which frames are read, that they are the right ones, odd files, loaders, augmentation."""
import contextlib
import itertools
import pickle
import re
import struct
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

import common
from common import (
    BadInput,
    BadVideo,
    VideoDataset,
    VideoLoader,
    center_crop,
    load_dataset,
    read_frames,
)
from common import write_video as encode

RNG = np.random.default_rng


def moving(count=40, height=48, width=64):
    """Frames that all differ: noise in blocks, rolled by 2 pixels a frame, uint8 (N, H, W, 3)"""
    still = RNG(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    still = still.repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(still, 2 * i, 1) for i in range(count)])


def whole(path):
    """What a plain loop decodes -> uint8 (N, 3, H, W)"""
    with av.open(str(path), metadata_errors="replace") as container:
        container.streams.video[0].thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def count(path):
    return common.index_video(str(path)).num_frames


def assert_equals_a_plain_loop(path, frames=None, singles=5):
    """All frames in order, some one by one from a seek, some unsorted and repeated."""
    everything = whole(path)
    N = len(everything)
    assert count(path) == N == (frames or N)
    assert torch.equal(read_frames(path, range(N)), everything)
    for i in [N - 1, *RNG(0).integers(N, size=singles)]:
        assert torch.equal(read_frames(path, [i])[0], everything[i])
    some = [N - 1, 0, N // 2, N // 3, N - 1]
    assert torch.equal(read_frames(path, some), everything[some])


def remux(source, target, change=None, **options):
    """Copy a video packet by packet. change: list of bytes -> list of bytes, for streams that are
    in order, and for AVI, which has no timestamps."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        if change:
            packets = [av.Packet(data) for data in change([bytes(packet) for packet in packets])]
            for n, packet in enumerate(packets):
                packet.pts, packet.dts, packet.time_base = n, n, Fraction(1, 24)
                packet.is_keyframe = kind(bytes(packet)) == "I"
        for packet in packets:
            packet.stream = stream
            new.mux(packet)


# ---- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "T"), [(17, 4), (83, 16), (1000, 8)])
def test_tsn_takes_the_middle_of_each_segment_and_trains_on_all_of_it(N, T):
    expected = [int(i * N / T + (N / T - 1) / 2) for i in range(T)]
    assert common.tsn_indices(N, T).tolist() == expected
    drawn = np.stack([common.tsn_indices(N, T, RNG(seed)) for seed in range(2000)])
    for i, column in enumerate(drawn.T):
        assert set(column) == set(range(i * N // T, (i + 1) * N // T))
    for few in (1, 3, T):  # a short clip repeats frames; training leaves none out
        assert common.tsn_indices(few, T).tolist() == [i * few // T for i in range(T)]
        drawn = common.tsn_indices(few, T, RNG(0)).tolist()
        assert drawn == sorted(drawn)
        assert len(drawn) == T
        assert set(drawn) == set(range(few))


def test_dense_windows():
    assert common.dense_indices(300, 8).tolist() == [[86 + 16 * i for i in range(8)]]  # the middle
    assert common.dense_indices(300, 16, views=3)[:, 0].tolist() == [0, 86, 172]  # last: 300 - 128
    assert (np.diff(common.dense_indices(300, 16, views=3)) == 8).all()
    assert common.dense_indices(50, 8).tolist() == [[16 * i % 50 for i in range(8)]]
    starts = [common.dense_indices(300, 8, RNG(seed))[0, 0] for seed in range(99)]
    assert 0 <= min(starts) < 20 < 150 < max(starts) <= 172
    assert common.dense_indices(1, 8, RNG(0)).tolist() == [[0] * 8]


# ---- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "codec", "options"), [
    ("a.mp4", "mpeg4", {}), ("b.mp4", "libx264", {"bf": "2"}), ("b.avi", "libx264", {"bf": "2"}),
    ("open.mkv", "libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=12"}),
    ("raw.h264", "libx264", {"bf": "2"}), ("b.ts", "libx264", {"bf": "2"}), ("a.wmv", "wmv2", {}),
    ("a.mpg", "mpeg2video", {"bf": "2"}), ("a.gif", "gif", {"pix_fmt": "rgb8"}),
    # keyframes from which no decoder can start: each picture is refreshed in stripes
    ("refresh.mkv", "libx264", {"x264-params": "intra-refresh=1:keyint=12"})])
def test_any_frame_of_any_container(tmp_path, name, codec, options):
    encode(tmp_path / name, moving(70), fps=25, codec=codec, **options)
    assert_equals_a_plain_loop(tmp_path / name, 70, singles=25)


def test_any_frame_of_real_clips(shared):
    # HMDB51: AVI with packed B-frames; metadata of one are not UTF-8
    paths = [*shared.glob("clips/*.avi"), *shared.glob("clips/SOX*.mp4")]
    assert len(paths) == 7
    for path in paths:
        assert_equals_a_plain_loop(path)


def test_any_frame_of_weizmann(shared):
    paths = sorted(shared.glob("weizmann/*/*.avi"))
    assert len(paths) == 90
    for path in paths[::3]:  # three people per action
        assert_equals_a_plain_loop(path, singles=1)


PICTURE = b"\0\0\1\xb6"  # how a picture of MPEG-4 starts


def kind(packet):
    return "IPBS"[packet[packet.index(PICTURE) + 4] >> 6] if PICTURE in packet else ""


def not_coded(packet):
    """A P-picture of the same time whose vop_coded is 0; nothing follows its header."""
    at = packet.index(PICTURE) + 4
    bits = f"{int.from_bytes(packet[at:at + 4], 'big'):032b}"
    time_at = bits.index("0", 2) + 2  # behind the seconds, 1...10, and a marker
    head = "01" + bits[2:time_at + 5] + "100"  # 5 bits of time, a marker, vop_coded, then stuffing
    head += "1" * (-len(head) % 8)
    return PICTURE + int(head, 2).to_bytes(len(head) // 8, "big")


def groups(packets):
    """[[I or P, B, B], ...]"""
    found = []
    for packet in packets:
        if kind(packet) != "B":
            found.append([])
        found[-1].append(packet)
    return found


def packed(packets):
    """As DivX and XviD pack B-frames: a B shares its packet with the P before it, and a picture
    that is not coded takes the place that is left."""
    out = []
    for anchor, *others in groups(packets):
        out.append(anchor + b"".join(others[:1]))
        out += others[1:]
        if others:
            out.append(not_coded(anchor))
    return out


XVID = {
    "as it is": lambda packets: packets,
    "lead-in": lambda packets: [b"\x7f", b"\x7f", *packets],
    "packed": packed,
    "packed, lead-in": lambda packets: [packets[0], b"\x7f", *packed(packets)[1:]],
    "cut at an I-frame": lambda packets: packets[list(map(kind, packets)).index("I", 1):]}


@pytest.mark.parametrize("how", XVID)
def test_avi_with_b_frames_as_xvid_writes_it(tmp_path, how):
    encode(tmp_path / "b.avi", moving(), bf="2")
    for name in ("xvid.avi", "xvid.mkv"):  # AVI has no timestamps; the copy's tell nothing either
        remux(tmp_path / "b.avi", tmp_path / name, XVID[how])
        data = (tmp_path / name).read_bytes()
        mark = re.search(rb"Lavc[\d.]+", data)[0]  # without DivX's, "\x7f" is taken for damage
        (tmp_path / name).write_bytes(data.replace(mark, b"DivX503b1393p".ljust(len(mark))))
        # the B-frames behind the I-frame of a cut refer to the group before it
        assert_equals_a_plain_loop(tmp_path / name, 28 if "cut" in how else 40)


@pytest.mark.parametrize(("name", "bf"), [("a.avi", 0), ("a.mp4", 0), ("b.avi", 2)])
def test_pictures_that_are_not_coded_count_as_in_a_plain_loop(tmp_path, name, bf):
    def change(packets):
        out = []
        for n, group in enumerate(groups(packets)):
            out += group + [not_coded(group[0])] * stills.count(n)
        return out

    stills = [1, 4, 4, 4, 13, 13, 13, 13]
    encode(tmp_path / "full.avi", moving(14 + 13 * bf), bf=str(bf))
    remux(tmp_path / "full.avi", tmp_path / name, change)
    assert_equals_a_plain_loop(tmp_path / name)
    if not bf:
        N = count(tmp_path / name)
        common.read_compressed(tmp_path / name, range(N))
        common.reencode(tmp_path / name, tmp_path / "copy.mp4")
        assert count(tmp_path / "copy.mp4") == N


def patched(data, mark, offset, number, order):
    at = data.index(mark) + offset
    return data[:at] + struct.pack(order + "I", number) + data[at + 4:]


@pytest.mark.parametrize("name", ["a.avi", "b.avi", "a.mp4"])
def test_declared_numbers_are_not_believed(tmp_path, name):
    encode(tmp_path / name, moving(), bf="2" if name == "b.avi" else "0")
    data = (tmp_path / name).read_bytes()
    if name == "a.mp4":
        data = patched(data, b"stts", 12, 4_000_000_000, ">")
    else:  # as FFmpeg writes them to a pipe
        data = patched(patched(data, b"avih", 24, 1 << 30, "<"), b"strh", 40, 1 << 30, "<")
    (tmp_path / name).write_bytes(data)
    start = time.process_time()
    assert_equals_a_plain_loop(tmp_path / name, 40)
    assert time.process_time() - start < 5


def test_an_index_that_is_wrong_is_not_believed(tmp_path):
    encode(tmp_path / "a.avi", moving())
    data = (tmp_path / "a.avi").read_bytes()
    at = data.index(b"idx1") + 8 + 16 * 5
    (tmp_path / "a.avi").write_bytes(data[:at] + b"JUNK" + data[at + 4:])  # 39 of 40 frames
    assert_equals_a_plain_loop(tmp_path / "a.avi", 40, singles=20)


def write_timed(path, frames, times, codec="libx264", bf="2"):
    """Encode frames with these timestamps, in 1/100 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=100, options={"g": "6", "bf": bf})
        stream.height, stream.width = frames.shape[1:3]
        for picture, at in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = int(at), Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_variable_frame_rate_counts_frames_not_seconds(tmp_path):
    write_timed(tmp_path / "vfr.mp4", moving(30), RNG(0).integers(1, 60, 30).cumsum())
    assert_equals_a_plain_loop(tmp_path / "vfr.mp4", 30)


@pytest.mark.parametrize("times", [[*range(10), *range(20, 40)], range(0, 120, 4)])
def test_frames_that_an_avi_dropped_do_not_count(tmp_path, times):
    # AVI writes an empty chunk in the place of each, and its header counts them
    write_timed(tmp_path / "a.avi", moving(30), times, "mpeg4", "0")
    assert_equals_a_plain_loop(tmp_path / "a.avi", 30)


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx"), ("b.avi", "libvpx"),
                                             ("c.avi", "mpeg2video")])
def test_packets_that_give_no_picture_do_not_count(tmp_path, name, codec):
    def change(packets):
        for n in (3, 8, 9, 20):  # VP8: the bit that says "show this frame"
            hidden = bytes([packets[n][0] & ~16]) + packets[n][1:]
            packets[n] = hidden if codec == "libvpx" else bytes(8)
        return packets

    encode(tmp_path / f"full-{name}", moving(30), codec=codec, qmin="10", qmax="40")
    remux(tmp_path / f"full-{name}", tmp_path / name, change)
    assert_equals_a_plain_loop(tmp_path / name, 26)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_frames_that_an_edit_list_hides_do_not_count(tmp_path, codec):
    # a cut without encoding anew, as phones make it: the file starts at a keyframe before the cut
    write_timed(tmp_path / "full.mp4", moving(30), range(0, 90, 3), codec)
    with av.open(str(tmp_path / "full.mp4")) as old, av.open(
            str(tmp_path / "cut.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                cut = round(Fraction(15, 100) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, stream
                new.mux(packet)
    assert_equals_a_plain_loop(tmp_path / "cut.mp4", 25)


def test_only_the_groups_that_are_needed_are_decoded(tmp_path):
    encode(tmp_path / "a.mp4", moving(120))
    assert common.index_video(str(tmp_path / "a.mp4")).keyframes.tolist() == list(range(0, 120, 12))
    for wanted, most in (([0], 1), ([24], 1), ([100], 5), ([0, 100, 101], 7), (range(120), 120)):
        assert len(list(common.decode_frames(tmp_path / "a.mp4", wanted))) == most


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "mpeg4")])
def test_frames_that_nothing_refers_to_are_not_decoded(tmp_path, name, codec):
    encode(tmp_path / name, moving(40), codec=codec, bf="3")
    wanted, everything = [3, 30], whole(tmp_path / name)
    assert torch.equal(read_frames(tmp_path / name, wanted), everything[wanted])
    found = [at for at, _ in common.decode_frames(tmp_path / name, wanted)]
    assert set(wanted) < set(found)
    assert len(found) < 25


@pytest.mark.parametrize(("degrees", "turns"), [(0, 0), (90, -1), (180, 2), (270, 1)])
def test_rotated_clips_are_turned_upright(shared, degrees, turns):
    path = shared / "odd-videos" / "decord" / f"video_{degrees}.mov"
    upright = torch.rot90(whole(path), turns, (2, 3))
    assert torch.equal(read_frames(path, range(3)), upright)
    assert upright.shape[2:] == ((568, 320) if turns % 2 else (320, 568))


@pytest.mark.parametrize(("matrix", "rows", "columns"), [
    ((-1, 0, 0, 0, 1, 0), 1, -1), ((1, 0, 0, 0, -1, 0), -1, 1), ((0, 0, 0, 0, 0, 0), 1, 1)])
def test_mirrored_clips_and_a_matrix_of_zeros(tmp_path, matrix, rows, columns):
    encode(tmp_path / "a.mp4", moving(3), codec="libx264")
    data = (tmp_path / "a.mp4").read_bytes()
    at = data.index(b"tkhd") + 44
    matrix = struct.pack(">6i", *(value << 16 for value in matrix))
    (tmp_path / "b.mp4").write_bytes(data[:at] + matrix + data[at + 24:])
    stored = whole(tmp_path / "a.mp4").numpy()
    shown = read_frames(tmp_path / "b.mp4", range(3)).numpy()
    assert (shown == stored[:, :, ::rows, ::columns]).all()


@pytest.mark.parametrize("options", ["open-gop=1:keyint=12:bframes=3:scenecut=0", "keyint=12"])
def test_a_file_that_starts_within_a_group_has_the_frames_that_can_be_decoded(tmp_path, options):
    encode(tmp_path / "a.mkv", moving(80), codec="libx264", **{"x264-params": options})
    with av.open(str(tmp_path / "a.mkv")) as old, av.open(str(tmp_path / "b.mkv"), "w") as new:
        stream, seen = new.add_stream_from_template(old.streams.video[0]), 0
        for packet in old.demux(video=0):
            seen += packet.is_keyframe
            if packet.size and seen > 2:
                packet.stream = stream
                new.mux(packet)
    assert_equals_a_plain_loop(tmp_path / "b.mkv")


def test_an_avi_index_that_lacks_a_frame_is_not_followed(tmp_path):
    encode(tmp_path / "a.avi", moving(60), codec="mjpeg", pix_fmt="yuvj420p")
    data = (tmp_path / "a.avi").read_bytes()
    at = data.index(b"idx1") + 8 + 16 * 12
    (tmp_path / "a.avi").write_bytes(data[:at] + data[at + 16:])
    assert_equals_a_plain_loop(tmp_path / "a.avi")


def test_pixels_that_cannot_be_converted_are_a_bad_video(tmp_path):
    encode(tmp_path / "a.mp4", moving(3), codec="libx264", **{"x264-params": "colormatrix=ycgco"})
    with pytest.raises(BadVideo, match="its pixels cannot be converted"):
        read_frames(tmp_path / "a.mp4", [0])


@pytest.mark.parametrize(("height", "width"), [(2, 2), (128, 96), (50, 90)])
def test_few_frames_and_few_pixels_and_another_size(tmp_path, height, width):
    frames = np.full((3, height, width, 3), 60, np.uint8)
    frames[:, :height // 2] = 200
    encode(tmp_path / "a.mp4", frames, codec="libx264")
    indices = common.tsn_indices(count(tmp_path / "a.mp4"), 8)
    assert read_frames(tmp_path / "a.mp4", indices).shape == (8, 3, height, width)
    own = read_frames(tmp_path / "a.mp4", indices, short_side=500, enlarge=False)  # as in training
    assert torch.equal(own, read_frames(tmp_path / "a.mp4", indices))
    small = read_frames(tmp_path / "a.mp4", indices, short_side=24).float()
    h, w = small.shape[2:]
    assert [h, w] == [round(a * 24 / min(height, width)) for a in (height, width)]
    assert abs(small[:, :, :h // 3] - 200).max() < 6
    assert abs(small[:, :, -(h // 3):] - 60).max() < 6


# ---- odd files -----------------------------------------------------------------------------------


def test_odd_videos_are_read_or_named_with_a_reason(shared):
    read, bad = set(), {}
    for path in sorted(shared.glob("odd-videos/*/*")):
        try:
            indices = common.tsn_indices(count(path), 8)
            assert read_frames(path, indices, short_side=32).shape[:2] == (8, 3)
            read.add(path.name)
        except BadVideo as error:
            bad[path.name] = error.reason if error.path == str(path) else ""
    assert read >= {
        "unordered.mov", "tiny_av1.mp4", "hevc_white_frame.mp4", "white.mp4",
        "video_colr_nclx_hdr10_full_range.mp4", "bbb_sunflower_QCIF_30fps_mp4v_noaudio_1f.mp4",
        "av1_video.mkv", "bt709_full_range.mp4", "h264_10bits.mp4", "h265_10bits.mp4"}
    assert "no video stream" in bad["afconvert-aac-0.5s.mp4"]
    assert "no frame" in bad["bipbop_cbcs_video_init.mp4"]
    assert all(bad.values())


def cover(path):
    """Sound with a picture on the sleeve, which is a video stream of one frame."""
    with av.open(str(path), "w", format="mp3") as container:
        audio = container.add_stream("mp3", rate=44100)
        picture = container.add_stream("mjpeg", rate=1, width=32, height=32)
        picture.pix_fmt, picture.disposition = "yuvj420p", av.stream.Disposition.attached_pic
        still = av.VideoFrame.from_ndarray(moving(1, 32, 32)[0], format="rgb24")
        for packet in picture.encode(still.reformat(format="yuvj420p")) + picture.encode(None):
            container.mux(packet)
        silence = np.zeros((1, 1152), np.int16)
        frame = av.AudioFrame.from_ndarray(silence, format="s16p", layout="mono")
        frame.rate = 44100
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


def cut(path):
    """MP4 has its index at the end."""
    encode(path, moving(), codec="libx264")
    path.write_bytes(path.read_bytes()[:5000])


def two_sizes(path):
    for i, frames in enumerate((moving(20), moving(20, 64, 96))):
        encode(path.with_name(f"{i}.h264"), frames, codec="libx264")
    path.write_bytes(path.with_name("0.h264").read_bytes() + path.with_name("1.h264").read_bytes())


def unknown_codec(path):
    encode(path, moving())
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"Zq7!"))


def stray_packets(path):
    """A transport stream where packets belong to no stream: PyAV's demuxer has an IndexError."""
    encode(path, moving(), codec="libx264")
    data = bytearray(path.read_bytes())
    data[188 * 80 + 2::188] = b"\x11" * len(data[188 * 80 + 2::188])
    path.write_bytes(data)


BAD_FILES = {  # name: (how it is made, a word of the reason)
    "missing.avi": (lambda path: None, "no such file"),
    "empty.mp4": (lambda path: path.touch(), "readable"),
    "text.avi": (lambda path: path.write_text("These are no moving pictures.\n" * 50), "readable"),
    # FFmpeg draws a text that is named so as ANSI art: four frames of letters
    "readme.txt": (lambda path: path.write_text("These are no moving pictures.\n" * 50), "video"),
    "cover.mp3": (cover, "no video stream"),
    "no-index.mp4": (cut, "readable"), "two-sizes.h264": (two_sizes, "size changes"),
    "unknown.avi": (unknown_codec, "codec")}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_raise_bad_video_with_a_reason(tmp_path, name):
    make, reason = BAD_FILES[name]
    make(tmp_path / name)
    with pytest.raises(BadVideo, match=reason) as caught:
        read_frames(tmp_path / name, common.tsn_indices(count(tmp_path / name), 8))
    assert caught.value.path == str(tmp_path / name)
    if "size" not in reason and name != "readme.txt":
        with pytest.raises(BadVideo):
            list(common._timed_frames(str(tmp_path / name)))
    again = pickle.loads(pickle.dumps(caught.value))  # loaders send it from process to process
    assert (again.path, again.reason) == (caught.value.path, caught.value.reason)


def test_packets_of_no_stream_are_a_bad_video_or_passed_over(tmp_path):
    """PyAV looks them up beyond the end of a list: what it finds there differs from run to run."""
    stray_packets(tmp_path / "stray.ts")
    encode(tmp_path / "whole.ts", moving(), codec="libx264")
    with contextlib.suppress(BadVideo):
        first = read_frames(tmp_path / "stray.ts", [0])
        assert torch.equal(first, read_frames(tmp_path / "whole.ts", [0]))
    with contextlib.suppress(BadVideo):
        list(common._timed_frames(str(tmp_path / "stray.ts")))


@pytest.mark.parametrize("index", [40, -1])
def test_a_frame_that_a_file_does_not_have_is_an_error(tmp_path, index):
    encode(tmp_path / "a.mp4", moving(40))
    with pytest.raises(BadVideo, match="40 frames"):
        read_frames(tmp_path / "a.mp4", [index])


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("b.avi", "mpeg4"),
                                             ("b.mp4", "libx264"), ("b.mkv", "libx264")])
def test_damaged_files_give_right_frames_or_bad_video(tmp_path, name, codec):
    encode(tmp_path / "full.mp4", moving(), fps=25, codec=codec, bf="0" if name == "a.avi" else "2")
    remux(tmp_path / "full.mp4", tmp_path / name,
          **({"movflags": "faststart"} if name == "b.mp4" else {}))
    data, rng, read = (tmp_path / name).read_bytes(), RNG(0), 0
    for i in range(40):
        path, bad = tmp_path / f"{i}-{name}", np.frombuffer(data, np.uint8).copy()
        part = (bad, bad[:1500], bad[-1500:], bad[2 * len(bad) // 3:])[i % 4]
        if i < 28:
            part[rng.integers(len(part), size=8)] = rng.integers(256, size=8)
        else:
            bad = bad[:rng.integers(len(bad))]
        path.write_bytes(bad.tobytes())
        with contextlib.suppress(BadVideo):
            N = count(path)
            frames = read_frames(path, range(N))
            plain = whole(path)
            both = min(N, len(plain))
            assert torch.equal(frames[:both], plain[:both])
            assert N - both <= 2  # the last frame stands in for what decoders lose
            # what is behind the damage depends on where decoding starts
            most = both if i >= 28 else both // 2 if i % 4 == 3 else 1
            for k in rng.integers(most, size=3):
                one = read_frames(path, [k])[0]
                assert torch.equal(one, plain[k])
                if name == "a.avi":
                    coded = common.read_compressed(path, [k])
                    assert (coded.frames[0].int() - one.int()).abs().max() <= 2
            read += 1
    assert read > 5


def test_a_seek_over_damage_gives_the_frames_of_one_pass(tmp_path):
    encode(tmp_path / "a.mp4", moving(30))
    with av.open(str(tmp_path / "a.mp4")) as container:
        places = [packet.pos for packet in container.demux(video=0)]
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    data[places[13] + 30] ^= 16
    (tmp_path / "a.mp4").write_bytes(data)
    everything = whole(tmp_path / "a.mp4")
    for i in range(15, 30):
        assert torch.equal(read_frames(tmp_path / "a.mp4", [i])[0], everything[i])


@pytest.mark.parametrize("name", ["ünï 漢字.mp4", "#20[1]&(b)!;c~@.mp4", "100%03d.mp4",
                                  "set:1/a.mp4", "http:/a.mp4", "concat:a.mp4|b.mp4"])
def test_names_that_ffmpeg_might_read_otherwise(tmp_path, monkeypatch, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    encode("plain.mp4", moving(5))
    (tmp_path / "plain.mp4").rename(name)
    assert len(read_frames(name, range(5))) == 5


@pytest.mark.parametrize(("name", "text"), [
    ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"),
    ("list.mp4", "ffconcat version 1.0\nfile {}\n")])
def test_a_playlist_does_not_open_what_it_names(tmp_path, name, text):
    encode(tmp_path / "other.ts", moving(5), fps=25, codec="libx264")
    (tmp_path / name).write_text(text.format("other.ts"))
    assert len(whole(tmp_path / name)) == 5
    with pytest.raises(BadVideo, match="readable"):
        count(tmp_path / name)


# ---- loaders -------------------------------------------------------------------------------------


def epochs(clips, count=2, **options):
    """All batches of some epochs as (keys, labels, videos)."""
    out = []
    for _, batches in VideoLoader(clips, **options).epochs(0, count):
        out += [(batch.rng_key, batch.label, batch.video) for batch in batches]
    return out


@pytest.mark.parametrize(("count", "side", "reads"), [
    (32, 37, [32]), (33, 37, [4] * 3), (32, 41, [4] * 3)])
def test_short_training_videos_of_few_pixels_are_decoded_once(
        tmp_path, monkeypatch, count, side, reads):
    path = str(tmp_path / "a.mp4")
    encode(path, moving(count, 96, 128))
    videos = VideoDataset([(path, 0)], 4, side, train=True)
    expected = [read_frames(path, common.tsn_indices(count, 4, RNG([0, epoch, 0])), side, False)
                for epoch in range(3)]
    calls = []

    def spy(path, indices, *more, **options):
        calls.append(len(indices))
        return read_frames(path, indices, *more, **options)

    monkeypatch.setattr(common, "read_frames", spy)
    for epoch, frames in enumerate(expected):
        video = videos[epoch, 0].video
        assert torch.equal(video, frames)
        assert video.stride() == frames.stride()  # resizing may round by it
    assert calls == reads


@pytest.mark.parametrize("train", [True, False])
def test_number_of_workers_does_not_change_the_batches(toy, train):
    clips = VideoDataset(load_dataset(toy).train, 4, 32, train=train, seed=3)
    here, there = epochs(clips, batch_size=7), epochs(clips, batch_size=7, workers=2)
    assert len(here) == len(there) == (12 if train else 14)
    for a, b in zip(here, there, strict=True):
        assert a[:2] == b[:2]
        assert all(map(torch.equal, a[2], b[2]))


def test_two_ranks_see_the_global_batch_of_one(toy):
    clips = VideoDataset(load_dataset(toy).train, 4, 32, train=True)
    one, *two = (epochs(clips, batch_size=8, **ranks) for ranks in
                 ({}, {"rank": 0, "world_size": 2}, {"rank": 1, "world_size": 2}))
    for batch, *parts in zip(one, *two, strict=True):
        assert len(parts[0][0]) == len(parts[1][0]) == 4
        videos = dict(zip(parts[0][0] + parts[1][0], parts[0][2] + parts[1][2], strict=True))
        assert sorted(videos) == sorted(batch[0])
        assert all(map(torch.equal, map(videos.get, batch[0]), batch[2]))


def test_order_of_clips():
    # 25 = 3 * 8 + 1: the last batch is smaller, and some rank has nothing to do then
    for world in (1, 2, 3):
        orders = [common.VideoBatchSampler(25, 8, rank=rank, world_size=world)
                  for rank in range(world)]
        keys = itertools.chain(*itertools.chain(*orders))
        assert sorted(i for _, i in keys) == list(range(25))
    order, seen = common.VideoBatchSampler(25, 8, train=True), []
    for epoch in (0, 1, 0):
        seen.append([i for _, i in itertools.chain(*order.batches(epoch))])
        assert len(set(seen[-1])) == len(seen[-1]) == 24
    assert seen[0] == seen[2] != seen[1]
    order.epochs = 1, 0
    assert [i for _, i in itertools.chain(*order)] == seen[1] + seen[0]
    other = common.VideoBatchSampler(25, 8, True, seed=1)
    assert [i for _, i in itertools.chain(*other)] != seen[0]
    with pytest.raises(BadInput, match="1 videos, or --batch-size, are too few for 2"):
        VideoLoader(VideoDataset([("a", 0)], 4, train=True), 8, world_size=2)


def test_training_frames_change_with_the_epoch_and_test_frames_do_not(toy):
    train, test = (VideoDataset(load_dataset(toy).train, 4, 32, train=train)
                   for train in (True, False))
    drawn = [train[epoch, 0].video for epoch in range(4)]
    assert torch.equal(drawn[0], train[0, 0].video)
    assert not all(torch.equal(drawn[0], video) for video in drawn)
    assert torch.equal(test[0, 0].video, test[1, 0].video)
    rows = load_dataset(toy).test
    assert VideoDataset(rows, 4, 32, "dense", views=3)[0, 0].video.shape == (12, 3, 32, 32)
    train = VideoDataset(rows, 4, 32, "dense", views=3, train=True)
    assert train[0, 0].video.shape == (4, 3, 32, 32)


def with_bad(toy, tmp_path, count, good=8):
    """-> (path, label) of good clips and of so many bad ones"""
    bad = [tmp_path / f"bad{i}.mp4" for i in range(count)]
    for path in bad:
        path.write_text("no video")
    return load_dataset(toy).train[:good] + [(str(path), 99) for path in bad]


def test_training_replaces_a_bad_clip_and_names_it_once(toy, tmp_path, capsys):
    clips = VideoDataset(with_bad(toy, tmp_path, 1), 4, 32, train=True)
    bad, replaced = common.Undecodable(), 0
    loader = VideoLoader(clips, 3, undecodable=bad)
    for _, batches in loader.epochs(0, 5):
        for batch in batches:
            for video, label, (_, i), found in zip(*batch, strict=True):
                assert video.shape == (4, 3, 32, 32)
                assert label == clips.videos[i][1] != 99  # label and key of the clip in its place
                replaced += bool(found)
    assert replaced == 5
    assert list(bad) == [str(tmp_path / "bad0.mp4")]
    assert capsys.readouterr().err.count("bad0.mp4: it is not a readable video") == 1


def test_testing_keeps_the_place_of_a_bad_clip(toy, tmp_path, capsys):
    loader = VideoLoader(VideoDataset(with_bad(toy, tmp_path, 2), 4, 32), 4, workers=2)
    batches = list(loader)
    videos = [video for batch in batches for video in batch.video]
    labels = [label for batch in batches for label in batch.label]
    assert labels[8:] == [-1, -1]  # and so it is never right
    assert -1 not in labels[:8]
    assert not torch.stack(videos[8:]).any()
    assert len(loader.undecodable) == 2
    assert capsys.readouterr().err.count("cannot decode") == 2


@pytest.mark.parametrize(("count", "of", "stops"), [
    (10, 12, False), (11, 12, True), (11, 1100, False), (12, 1100, True)])
def test_more_than_ten_and_more_than_one_percent_stop(tmp_path, monkeypatch, count, of, stops):
    (tmp_path / "bad").mkdir()
    rows = [(str(tmp_path / "bad" / f"{i}.mp4"), 0) for i in range(count)]
    clips = VideoDataset(rows + [("good", 0)] * (of - count), 1, 32)
    good = torch.zeros(1, 3, 32, 32)
    read = VideoDataset.read
    monkeypatch.setattr(VideoDataset, "read", lambda self, path, rng:
                        good if path == "good" else read(self, path, rng))
    with pytest.raises(BadInput, match=f"{count} of {of}") if stops else contextlib.nullcontext():
        assert len(list(VideoLoader(clips, count))) == -(-of // count)
    with pytest.raises(BadInput, match=rf"{count} of {count}.*\d.mp4"):  # none is good
        next(iter(VideoLoader(VideoDataset(rows, 1, 32, train=True), count)))


def test_loaders_of_a_data_set_count_its_undecodable_videos_together(toy, tmp_path):
    data = load_dataset(toy)
    rows = with_bad(toy, tmp_path, 12, 0)
    list(VideoLoader(VideoDataset(rows[:8], 1, 32), 8, undecodable=data.undecodable))
    with pytest.raises(BadInput, match="12 of 72 videos"):
        list(VideoLoader(VideoDataset(rows[8:], 1, 32), 8, undecodable=data.undecodable))


# ---- views ---------------------------------------------------------------------------------------


def noise(T=4, height=40, width=56, seed=0):
    return torch.from_numpy(RNG(seed).integers(0, 256, (T, 3, height, width), np.uint8))


def view(video, seed, mirror=True):
    """The training view of one clip, 32 pixels -> (T, 3, 32, 32)"""
    batch = common.Sample([video], [0], [(0, 0)], [[]])
    return common.augment(batch, 32, [mirror], seed, "cpu")[0]


def test_augmentation_is_drawn_once_per_clip_by_its_generator():
    still, seen = noise(1).expand(6, -1, -1, -1), []
    for seed in range(20):
        out = view(still, seed)
        assert out.shape == (6, 3, 32, 32)
        assert (out == out[:1]).all()
        assert 0 <= out.min() < out.max() <= 1
        assert torch.equal(out, view(still, seed))
        seen.append(out)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("mirror", [True, False])
def test_flips_only_where_they_are_allowed(mirror):
    # left dark, right bright: no colour jitter turns that round
    video = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    video[..., 16:] = 200
    flipped = 0
    for seed in range(40):
        row = view(video, seed, mirror).mean((0, 1, 2))
        flipped += row[:16].mean() > row[16:].mean()
    assert 10 < flipped < 30 if mirror else flipped == 0


def test_augmentation_colours_as_said():
    grey, same = 0, 0
    plain = torch.tensor([200, 100, 50]).byte()[:, None, None].expand(1, 3, 64, 64)
    for seed in range(60):
        out = view(plain, seed)
        grey += (out[:, :1] == out).all()
        same += torch.allclose(out, plain[..., :32, :32] / 255, atol=1e-5)
    assert 4 <= grey <= 22  # p .2
    assert 2 <= same <= 20  # p .2 * .8: neither jitter nor grey


def test_jitter_is_torchvisions_one_clip_after_the_other():
    clips = torch.stack([noise(2, 9, 7, seed) for seed in range(5)]) / 255
    clips[0], clips[1, :, 1:] = .5, clips[1, :, :1]  # a plain clip, a grey one
    factors = torch.tensor([[.6, 1.4, .8, -.1, 0], [1.4, .6, 1.2, .1, 0], [1, 1, 1, 0, 1],
                            [1, 1, 1, 0, 0], [1.3, 1.2, 1.1, .05, 1]])
    for clip, (bright, contrast, saturation, hue, grey), out in zip(
            clips, factors.tolist(), common.color_jitter(clips, factors), strict=True):
        clip = TF.adjust_contrast(TF.adjust_brightness(clip, bright), contrast)
        clip = TF.adjust_hue(TF.adjust_saturation(clip, saturation), hue)
        clip = TF.rgb_to_grayscale(clip, num_output_channels=3) if grey else clip
        assert (out - clip).abs().max() < 1e-5


def test_views_of_a_batch_are_those_of_its_clips():
    videos = [noise(4, 40, 56), noise(4, 64, 40, seed=1), noise(4, 33, 33, seed=2)]
    keys = [(2, 5), (2, 0), (2, 9)]
    batch = common.Sample(videos, [1, 0, 1], keys, [[], [], []])
    both = common.augment(batch, 32, [False, True], 7, "cpu")
    assert both.shape == (3, 4, 3, 32, 32)
    part = common.Sample(*(part[1:] for part in batch))  # whatever stands beside it in the batch
    assert torch.equal(both[1:], common.augment(part, 32, [False, True], 7, "cpu"))
    assert not torch.equal(both, common.augment(batch, 32, [False, True], 8, "cpu"))
    assert torch.equal(center_crop(videos, 32)[0], videos[0][..., 4:36, 12:44] / 255)
    assert center_crop(videos, 32).shape == (3, 4, 3, 32, 32)


def test_draws_are_the_same_at_any_size():
    # one clip at two sizes: a teacher sees what its student sees
    video = noise(1, 8, 8).repeat_interleave(28, -1).repeat_interleave(28, -2)
    for seed in range(8):
        large, small = (common.augment(common.Sample([video], [0], [(0, seed)], [[]]), size,
                                             [True], 0, "cpu") for size in (96, 48))
        assert (torch.nn.functional.avg_pool2d(large[0], 2) - small[0]).abs().mean() < .03


def test_mirrors_spares_words_that_tell_left_from_right():
    classes = ["turn left", "clap", "Right hand up", "brightly lit", "leftover", "moving left",
               "go leftwards", "turn ccw", "anti-clock-wise"]
    assert common.flippable(classes) == [False, True, False, True, True, *[False] * 4]
