"""Steps on a GPU that is not there: tensors that claim to lie on it have shapes, no values. What is
left on the CPU, or has a shape that depends on values, raises; copies and reads of values, which
wait for the GPU, and matrix products that autocast does not reach, are counted."""
import collections
import itertools

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import common
import deit_video
import pkd_compressed
import spatial_kd
import tinyclip_swap
import wise_infer

DEVICE, B, STEPS = torch.device("cuda"), 8, 3
SMALL = ["--frames", "4", "--epochs", "1", "--batch-size", str(B), "--workers", "0"]
CALLS = 20  # at most, of a few functions whose time is measured
PRODUCTS = "mm", "addmm", "convolution"  # attention's own upcast is that of no real GPU
READS = {"item": lambda x: 1., "__bool__": lambda x: False, "__index__": lambda x: 0,
         "__int__": lambda x: 1, "tolist": lambda x: np.zeros(x.shape, int).tolist()}


class Counter(TorchDispatchMode):
    """flops: of PRODUCTS per dtype; reads: of values; waits: these, and copies between devices that
    block"""

    def __init__(self):
        super().__init__()
        self.flops, self.waits, self.reads = collections.Counter(), [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, name = func(*args, **kwargs), func._overloadpacket.__name__
        if name in PRODUCTS:
            count = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            self.flops[args[0].dtype] += count
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
            if source.device.type != out.device.type and waits:
                self.waits.append(f"{name} {tuple(source.shape)}")
        return out


def call_five_times(function):
    for _ in range(5):
        function().cpu()
    return 1.


@pytest.fixture
def on_gpu(monkeypatch, toy):
    """on_gpu(script, batches, function, ...) -> Counter of function(...); batches: what loaders
    give"""
    def run(script, batches, function, *given):
        monkeypatch.setattr(script, "DEVICE", DEVICE)
        monkeypatch.setattr(script, "autocast", lambda: torch.autocast("cuda", torch.bfloat16),
                            raising=False)
        monkeypatch.setattr(common.VideoLoader, "__iter__", lambda self: iter(batches))
        with monkeypatch.context() as patch, Counter() as counter:
            for name, value in READS.items():
                def read(tensor, name=name, value=value):
                    if tensor.device.type == "cuda":
                        counter.reads.append(f"{name} {tuple(tensor.shape)}")
                        counter.waits.append(counter.reads[-1])
                    return value(tensor)
                patch.setattr(FakeTensor, name, read, raising=False)
            function(*given)
        return counter

    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)  # needs a real GPU
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)

    def tokenize_classes(self, classes, templates=None):
        shape = len(templates or self.templates), len(classes), self.clip_model.context_length
        return torch.zeros(shape, dtype=torch.long, device=DEVICE)

    def encode_classes(self, classes, templates=None):
        P = len(templates or self.templates)
        return torch.rand(P, len(classes), self.embed_dim, device=DEVICE)

    monkeypatch.setattr(common.ActionCLIP, "tokenize_classes", tokenize_classes)
    monkeypatch.setattr(common.ActionCLIP, "encode_classes", encode_classes)
    for script in (tinyclip_swap, spatial_kd, deit_video, pkd_compressed):
        monkeypatch.setattr(script, "save_predictions", lambda *_: None)
        monkeypatch.setattr(script, "log_and_checkpoint", lambda *_: None)
        monkeypatch.setattr(script, "median_ms", call_five_times, raising=False)
        # an epoch, not a step, may read its losses
        monkeypatch.setattr(script, "epoch_means", lambda losses, _: [0.] * len(losses[0]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield run


def check(counter, most=None, before=0):
    """No training step waits or reads a value, if `before` copies precede the steps; other calls
    wait less often than `most`; only losses are computed in fp32."""
    assert most or not counter.reads, counter.reads
    assert len(counter.waits) < before + (most or STEPS), counter.waits
    assert counter.flops[torch.bfloat16] > 20 * counter.flops[torch.float32]


@pytest.fixture(scope="module")
def clips(toy, coded):
    """Data, and batches of three loaders: training and test videos, and compressed ones"""
    data, pairs = common.load_dataset(str(toy)), common.load_dataset(str(coded))
    datasets = [common.VideoDataset(data.train, 4, 37, train=True),
                common.VideoDataset(data.test, 4, 37),
                common.CompressedDataset(pairs.train, 2, train=True)]
    loaders = [common.VideoLoader(dataset, B) for dataset in datasets]
    return data, pairs, [list(itertools.islice(loader, STEPS)) for loader in loaders]


@pytest.fixture
def build(monkeypatch):
    """build(function, ...) -> function(...), a network on that GPU"""
    def run(function, *given, **flags):
        with monkeypatch.context() as patch, DEVICE:
            patch.setattr(torch.Tensor, "item", lambda self: 14.3)  # the scale
            return function(*given, **flags)
    return run


def test_tinyclip_swap(on_gpu, build, clips, tmp_path):
    data, _, (batches, tests, _) = clips
    args = tinyclip_swap.parse([*SMALL, "--affinity"])
    small, large = [build(common.build_actionclip, "toy-small:random") for _ in range(2)]
    check(on_gpu(tinyclip_swap, batches, tinyclip_swap.train, "small_affinity", small, large, data,
                 args, tmp_path))
    check(on_gpu(tinyclip_swap, tests, tinyclip_swap.evaluate, small, data, args, tmp_path),
          3 * len(tests))
    check(on_gpu(tinyclip_swap, [], tinyclip_swap.benchmark, small, data, args), CALLS)
    text = torch.rand(16, 6, small.embed_dim, device=DEVICE)
    embeddings = collections.deque(maxlen=4)
    check(on_gpu(tinyclip_swap, [], tinyclip_swap.stream_step, small, embeddings,
                 tests[0].video[0][0], text), 2)


@pytest.mark.parametrize("variant", ["vifi_clip", "text4vis"])
def test_tinyclip_swap_compare(on_gpu, build, clips, tmp_path, variant):
    data, _, (batches, _, _) = clips
    recipe = tinyclip_swap.VARIANTS[variant]
    model = build(common.build_actionclip, "toy-small:random", recipe.head)
    model.templates = recipe.templates
    check(on_gpu(tinyclip_swap, batches, tinyclip_swap.train, variant, model, None, data,
                 tinyclip_swap.parse(SMALL), tmp_path))


def test_spatial_kd(on_gpu, build, clips, tmp_path):
    data, _, (batches, tests, _) = clips
    tasks = [task._replace(targets=torch.rand(len(data.train), len(task.labels)))
             for task in spatial_kd.toy_vocabulary()]
    model = build(common.build_actionclip, "toy-small:random")
    student = build(spatial_kd.Student, model, tasks)
    args = spatial_kd.parse(SMALL)
    check(on_gpu(spatial_kd, batches, spatial_kd.train, "spatial", student, data, [False] * 6, args,
                 tmp_path), before=len(tasks))
    check(on_gpu(spatial_kd, tests, spatial_kd.evaluate, student, data, args, tmp_path),
          9 * len(tests))


@pytest.mark.parametrize("variant", ["two_heads_hard", "two_heads_soft"])
def test_deit_video_training(on_gpu, build, clips, tmp_path, variant):
    data, _, (batches, _, _) = clips
    teacher = build(common.build_actionclip, "toy-small:random").requires_grad_(False)
    model = build(common.build_actionclip, "toy-small:random", deit_video.TokenFusionHead)
    student = build(deit_video.DeiTStudent, model, deit_video.VARIANTS[variant], [])
    check(on_gpu(deit_video, batches, deit_video.train, variant, student, teacher, data,
                 [False] * 6, deit_video.parse(SMALL), tmp_path))


def test_deit_video(on_gpu, build, clips, tmp_path):
    data, _, (_, tests, _) = clips
    args = deit_video.parse(SMALL)
    model = build(common.build_actionclip, "toy-small:random", deit_video.TokenFusionHead)
    check(on_gpu(deit_video, tests, deit_video.evaluate, model, data, args, tmp_path),
          3 * len(tests))
    check(on_gpu(deit_video, [], deit_video.benchmark_embedding, model, 4), CALLS)
    video = torch.rand(1, 4, 3, model.crop_size, model.crop_size, device=DEVICE)
    on_gpu(deit_video, [], deit_video.token_attention, model, video)


def test_pkd_compressed(on_gpu, build, clips, tmp_path, monkeypatch):
    _, data, (_, _, batches) = clips
    monkeypatch.setattr(pkd_compressed, "CACHE_GB", 0)
    args = pkd_compressed.parse(["--segments", "2", "--batch-size", str(B), "--workers", "0",
                                 "--epochs", "1", "--exit-epochs", "1", "--schedules", "labels",
                                 "progressive"])
    streams = build(pkd_compressed.Streams, ["toy"] * 3, 12)
    exits = build(pkd_compressed.Exits, streams, args.schedules, 12, 0)
    check(on_gpu(pkd_compressed, batches, pkd_compressed.train_networks, streams, data, {},
                 tmp_path, args))
    check(on_gpu(pkd_compressed, batches, pkd_compressed.train_exits, streams, exits, data, [],
                 {}, tmp_path, args))
    check(on_gpu(pkd_compressed, batches, pkd_compressed.evaluate, streams, exits, data.train,
                 {}, args), 3)
    cascade = object.__new__(wise_infer.Cascade)
    vars(cascade).update(nets=streams.nets, heads=exits.heads["labels"],
                         streams=("mv", "r", "i"), size=32, segments={"mv": 2, "r": 2, "i": 2})
    on_gpu(wise_infer, [], cascade.predict, data.test[0][0],
           torch.rand(12, 12, dtype=torch.float64), .9)


# ---- mistakes that it must find


@pytest.mark.parametrize(("what", "found"), [
    ("left on the CPU", "device"), ("waits for a value", "aten.nonzero"),
    ("reads a value", r"item \(\)"),
    ("waits for a copy", r"_to_copy \(8,\)"), ("fp32", "> .20 [*]")])
def test_planted_mistakes_are_found(on_gpu, build, clips, tmp_path, monkeypatch, what, found):
    data, _, (batches, _, _) = clips
    loss = tinyclip_swap.actionclip_loss

    def broken(v, t, labels, scale):
        if what == "left on the CPU":
            scale = torch.ones(1)
        if what == "waits for a value":
            labels = labels[labels >= 0]
        if what == "waits for a copy":
            labels = torch.tensor(batches[0].label, device=DEVICE)
        return loss(v, t, labels, scale)

    monkeypatch.setattr(tinyclip_swap, "actionclip_loss", broken)
    model, args = build(common.build_actionclip, "toy-small:random"), tinyclip_swap.parse(SMALL)
    if what == "reads a value":
        monkeypatch.setattr(tinyclip_swap, "gather", lambda x: x * x.sum().item())
    if what == "fp32":
        model.encode_frames = torch.autocast("cuda", enabled=False)(model.encode_frames)
    with pytest.raises((RuntimeError, AssertionError), match=found):
        check(on_gpu(tinyclip_swap, batches, tinyclip_swap.train, "large", model, None, data, args,
                     tmp_path))
