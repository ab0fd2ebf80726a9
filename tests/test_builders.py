"""The builders of common.py: are the networks those of the papers, do files load as they should?

CLIP and ActionCLIP are written out below once more, by hand, as functions of a state dict with the
official names. A wrong activation, mask or eps loads without a word; only outputs tell.
"""
import functools
import http.server
import math
import re
import sys
import threading

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import common
import tinyclip_swap
from common import BadInput, FusionHead, MeanHead, build_actionclip, build_clip_model

QUICK = open_clip.transformer.QuickGELU
EIGHT = "TinyCLIP-ViT-8M-16-Text-3M"
MEAN = torch.tensor([.48145466, .4578275, .40821073]).view(3, 1, 1)  # of CLIP's pixels
STD = torch.tensor([.26862954, .26130258, .27577711]).view(3, 1, 1)
SIZES = {"D": 96, "width": 128, "layers": 2, "patch": 16, "side": 48,
         "text_width": 192, "text_layers": 2}
HEADS = 3  # of the text tower and of the fusion head: text width // 64


# ---- CLIP and ActionCLIP, by hand ----------------------------------------------------------------


def blocks_state(prefix, width, layers):
    shapes = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
              "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
              "ln_1.weight": (width,), "ln_1.bias": (width,),
              "ln_2.weight": (width,), "ln_2.bias": (width,),
              "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
              "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}
    return {f"{prefix}resblocks.{i}.{name}": shape for i in range(layers)
            for name, shape in shapes.items()}


def clip_shapes(D, width, layers, patch, side, text_width, text_layers):
    """Names and shapes of the tensors of an OpenAI CLIP with a ViT."""
    return {"positional_embedding": (77, text_width), "text_projection": (text_width, D),
            "logit_scale": (), "visual.class_embedding": (width,),
            "visual.positional_embedding": ((side // patch) ** 2 + 1, width),
            "visual.proj": (width, D), "visual.conv1.weight": (width, 3, patch, patch),
            **{f"visual.{name}": (width,) for name in
               ("ln_pre.weight", "ln_pre.bias", "ln_post.weight", "ln_post.bias")},
            **blocks_state("visual.transformer.", width, layers),
            **blocks_state("transformer.", text_width, text_layers),
            "token_embedding.weight": (49408, text_width),
            "ln_final.weight": (text_width,), "ln_final.bias": (text_width,)}


def fusion_shapes(D, layers=6):
    return {"frame_position_embeddings.weight": (77, D), **blocks_state("transformer.", D, layers)}


def draw(shapes, seed=0):
    """Random tensors, large enough that each of them matters to the output."""
    rng = torch.Generator().manual_seed(seed)
    return {name: (1. if "ln_" in name and name.endswith("weight") else 0.)
            + torch.randn(shape, generator=rng) * (shape[-1] ** -.5 if len(shape) > 1 else .3)
            for name, shape in shapes.items()}


def norm(x, state, name, eps=1e-5):
    spread = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    return ((x - x.mean(-1, keepdim=True)) / (spread + eps) ** .5 * state[f"{name}.weight"]
            + state[f"{name}.bias"])


def attend(x, state, name, heads, mask):
    x = x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"]
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in x.chunk(3, -1))
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** .5 + mask).softmax(-1)
    x = (weights @ v).transpose(1, 2).flatten(2)
    return x @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def quick(x):
    return x / (1 + torch.exp(-1.702 * x))


def exact(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def transform(x, state, prefix, heads, act, eps=1e-5, mask=0.):
    layers = len({name.split("resblocks.")[1].split(".")[0] for name in state
                  if name.startswith(f"{prefix}resblocks.")})
    for i in range(layers):
        at = f"{prefix}resblocks.{i}."
        x = x + attend(norm(x, state, f"{at}ln_1", eps), state, f"{at}attn", heads, mask)
        h = norm(x, state, f"{at}ln_2", eps) @ state[f"{at}mlp.c_fc.weight"].T
        h = act(h + state[f"{at}mlp.c_fc.bias"])
        x = x + h @ state[f"{at}mlp.c_proj.weight"].T + state[f"{at}mlp.c_proj.bias"]
    return x


def hand_images(state, frames, act):
    """(B, 3, S, S) in 0..1 -> (B, D)"""
    kernel = state["visual.conv1.weight"]
    patches = F.unfold((frames - MEAN) / STD, kernel.shape[-1], stride=kernel.shape[-1]).mT
    x = patches @ kernel.flatten(1).T
    first = state["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + state["visual.positional_embedding"]
    x, heads = norm(x, state, "visual.ln_pre"), x.shape[-1] // 64
    x = transform(x, state, "visual.transformer.", heads, act)
    return norm(x[:, 0], state, "visual.ln_post") @ state["visual.proj"]


def hand_texts(state, tokens, heads, act):
    """(B, 77) -> (B, D): the output at the end token, which has the largest id."""
    mask = torch.full((77, 77), -torch.inf).triu(1)
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    x = norm(transform(x, state, "transformer.", heads, act, mask=mask), state, "ln_final")
    return x[range(len(x)), tokens.argmax(1)] @ state["text_projection"]


def hand_fusion(state, f, heads):
    x = f + state["frame_position_embeddings.weight"][:f.shape[1]]
    return (transform(x, state, "transformer.", heads, quick, eps=1e-12) + f).mean(1)


def assert_near(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture
def tiny(monkeypatch):
    """`ViT-B-32`, made small, so that its tests are quick; another side than 224, D is not 512."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", {
        "embed_dim": 96,
        "vision_cfg": {"image_size": 48, "layers": 2, "width": 128, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3,
                     "layers": 2}})
    return draw(clip_shapes(**SIZES))


def keep(state, path):
    torch.save(state, path)
    return path


def official(path, state, fusion):
    """A checkpoint as ActionCLIP's code writes it."""
    state = {name: value.half() for name, value in state.items()}
    fusion = {f"module.{name}": value for name, value in fusion.items()}
    return keep({"epoch": 49, "model_state_dict": state, "fusion_model_state_dict": fusion,
                 "optimizer_state_dict": {"state": {}, "param_groups": []}}, path)


NO_VIDEOS = common.VideoLists("", [], [], [])


def one_layer(width, heads, layers, std, position_std):
    """A FusionHead of one layer, which is quick"""
    return FusionHead(width, heads, 1, std, position_std)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def activation(clip):
    """What stands between the two layers of every MLP."""
    found = {type(block.mlp.gelu) for block in clip.modules() if hasattr(block, "mlp")}
    assert len(found) == 1
    return found.pop()


# ---- official ActionCLIP checkpoints -------------------------------------------------------------


def test_an_official_checkpoint_gives_the_official_outputs(tiny, tmp_path):
    fusion = draw(fusion_shapes(96), seed=1)
    path = official(tmp_path / "vit-b-32-8f.pt", tiny, fusion)
    model = build_actionclip(f"ViT-B-32:{path}").eval()
    state = {name: value.half().float() for name, value in tiny.items()}
    video, names = torch.rand(2, 8, 3, 48, 48), [f"climb {i} stairs" for i in range(33)]
    with torch.no_grad():
        frames = hand_images(state, video.flatten(0, 1), quick).unflatten(0, (2, 8))
        assert_near(model.encode_video(video), hand_fusion(fusion, frames, HEADS))
        texts = model.encode_classes(names)  # 528, more than go in one part
        assert texts.shape == (16, 33, 96)
        for k in (0, 15):
            assert_near(texts[k], hand_texts(state, model.tokenize_classes(names)[k], HEADS, quick))
    assert model.clip_model.quick_gelu
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_a_real_backbone_has_the_official_names_and_shapes():
    with torch.device("meta"):
        model = build_actionclip("ViT-B-32:random")
    sizes = {"D": 512, "width": 768, "layers": 12, "patch": 32, "side": 224, "text_width": 512,
             "text_layers": 12}
    for part, shapes in ((model.clip_model, clip_shapes(**sizes)),
                         (model.fusion, fusion_shapes(512))):
        assert {name: tuple(value.shape) for name, value in part.state_dict().items()} == shapes
    # pixel mean and std stay out of checkpoints, whose halves have the official names
    assert {name.partition(".")[0] for name in model.state_dict()} == {"clip_model", "fusion"}


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_place(tiny, tmp_path):
    path = official(tmp_path / "a.pt", tiny, draw(fusion_shapes(64, layers=2)))
    for head in (FusionHead, MeanHead):
        with pytest.raises(BadInput, match=r"a\.pt does not fit the fusion head"):
            build_actionclip(f"ViT-B-32:{path}", head)
    small = dict(build_clip_model("toy-small:random")[0].state_dict())
    for change in ({"visual.proj": torch.ones(3, 3)}, {"more": torch.ones(2)}):
        keep({"state_dict": small | change}, path)
        with pytest.raises(BadInput, match=rf"a\.pt.*toy-small.*{next(iter(change))}") as error:
            build_clip_model(f"toy-small:{path}")
        assert "\n" not in str(error.value)


# ---- the activation goes with the weights --------------------------------------------------------


@pytest.mark.parametrize(("tag", "act"), [("openai", quick), ("laion2b_s34b_b79k", exact)])
def test_a_tag_brings_its_own_activation(tiny, tmp_path, monkeypatch, capsys, tag, act):
    tags = open_clip.pretrained._PRETRAINED["ViT-B-32"]  # a file in place of the download
    monkeypatch.setitem(tags, tag, {**tags[tag], "file": str(keep(tiny, tmp_path / "a.bin"))})
    clip, tokenizer, _ = build_clip_model(f"ViT-B-32:{tag}")
    tokens = tokenizer(["a dog runs"])
    with torch.no_grad():
        assert_near(clip.encode_text(tokens), hand_texts(tiny, tokens, HEADS, act))
    assert clip.quick_gelu == (act is quick)
    assert "RANDOM" not in capsys.readouterr().err
    build_clip_model("ViT-B-32")
    assert "RANDOM WEIGHTS" in capsys.readouterr().err


def test_bare_tensors_take_the_activation_of_the_name(tiny, tmp_path):
    path = keep(tiny, tmp_path / "a.pt")
    assert activation(build_clip_model(f"ViT-B-32:{path}")[0]) is nn.GELU
    open_clip.factory._MODEL_CONFIGS["ViT-B-32"]["quick_gelu"] = True  # as ViT-B-32-quickgelu
    assert activation(build_clip_model(f"ViT-B-32:{path}")[0]) is QUICK


def archive(state, path):
    """OpenAI's files are TorchScript archives, fp16, with three numbers beside the tensors."""
    root = nn.Module()
    numbers = dict.fromkeys(("input_resolution", "context_length", "vocab_size"), torch.tensor(9))
    for name, value in {**state, **numbers}.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.register_buffer(leaf, value.half() if value.is_floating_point() else value)
    torch.jit.save(torch.jit.script(root), path)
    return path


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated; the files are still around
def test_an_openai_archive_is_not_run_but_the_command_converts_it(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = open_clip.factory._MODEL_CONFIGS
    monkeypatch.setitem(configs, "ViT-B-32-quickgelu", {**configs["ViT-B-32"], "quick_gelu": True})
    with pytest.raises(BadInput, match="TorchScript") as error:
        build_clip_model(f"ViT-B-32:{archive(tiny, tmp_path / 'ViT-B-32.pt')}")
    exec(re.search(r'python -c "(.*)"', str(error.value))[1])
    clip, _, _ = build_clip_model("ViT-B-32-quickgelu:FILE")
    assert same({name: value.half().float() for name, value in tiny.items()}, clip.state_dict())
    assert clip.quick_gelu
    assert activation(clip) is QUICK


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_our_own_checkpoint_knows_backbone_activation_and_frames(tmp_path, quick_gelu):
    model = build_actionclip("toy-small:random", one_layer)
    model.clip_model.quick_gelu = quick_gelu
    path = keep({"model_state_dict": model.clip_model.state_dict(), **model.metadata(5, NO_VIDEOS),
                 "fusion_model_state_dict": model.fusion.state_dict(), "optimizer": None},
                tmp_path / "a:3.pt")
    for again in (build_actionclip(f"toy-small:{path}", one_layer),
                  build_actionclip("toy-large", one_layer, checkpoint=path)):
        assert same(model.state_dict(), again.state_dict())
        assert activation(again.clip_model) is (QUICK if quick_gelu else nn.GELU)
        assert (again.name, again.frames) == ("toy-small", 5)
        assert again.clip_model.quick_gelu == quick_gelu


def test_a_checkpoint_says_what_can_be(tmp_path):
    model = build_actionclip("toy-small:random", MeanHead)
    saved = {"model_state_dict": model.clip_model.state_dict(), "fusion_model_state_dict": {},
             **model.metadata(8, NO_VIDEOS)}
    path = keep(saved, tmp_path / "a.pt")
    assert isinstance(build_actionclip("toy-large", MeanHead, checkpoint=path).fusion, MeanHead)
    with pytest.raises(BadInput, match="does not fit the fusion head"):
        build_actionclip("toy-large", checkpoint=path)
    for frames in (0, 1e9, "x", 8.):
        keep(saved | {"frames": frames}, path)
        with pytest.raises(BadInput, match=r"a\.pt.*1 to 77"):
            build_actionclip("toy-large", MeanHead, checkpoint=path)
    keep({"state_dict": model.clip_model.state_dict()}, path)
    with pytest.raises(BadInput, match=r"a\.pt holds no fusion head"):
        build_actionclip("toy-small", checkpoint=path)
    model.clip_model.positional_embedding.data[1, 2] = math.nan
    keep({"state_dict": model.clip_model.state_dict()}, path)
    with pytest.raises(BadInput, match=r"a\.pt: positional_embedding .* not finite"):
        build_actionclip(f"toy-small:{path}")


def test_texts_without_padding_have_the_same_embeddings_and_gradients():
    model = build_actionclip("toy-small:random", MeanHead).double()
    tokens = model.tokenize_classes(["run", "climb the stairs"])
    assert 10 < model.longest_text < tokens.shape[-1] == 20
    texts, gradients = [], []
    for length in (20, model.longest_text):
        texts.append(model.encode_text(tokens[..., :length]))
        model.zero_grad()
        texts[-1].square().sum().backward()
        gradients.append([w.grad for w in model.clip_model.parameters() if w.grad is not None])
    torch.testing.assert_close(*texts)
    torch.testing.assert_close(*gradients)
    assert torch.equal(texts[0], model.clip_model.encode_text(tokens.flatten(0, 1)).view(16, 2, 48))


def test_names_that_a_clip_cannot_tell_apart_are_refused():
    model = build_actionclip("toy-small:random", MeanHead)
    with pytest.raises(BadInput, match="20 tokens"):
        model.tokenize_classes(["a", "very " * 20 + "long", "very " * 20 + "short"])


# ---- TinyCLIP ------------------------------------------------------------------------------------


SIX = {  # parameters in millions: image tower, text tower without its embedding, all
    "TinyCLIP-ViT-39M-16-Text-19M": (38.587, 19.217, 83.101),
    "TinyCLIP-ViT-8M-16-Text-3M": (8.277, 2.521, 23.446),
    "TinyCLIP-ResNet-30M-Text-29M": (29.584, 28.936, 83.817),
    "TinyCLIP-ResNet-19M-Text-19M": (18.597, 19.479, 63.373),
    "TinyCLIP-ViT-61M-32-Text-29M": (61.411, 28.674, 115.382),
    "TinyCLIP-ViT-40M-32-Text-19M": (39.692, 19.217, 84.206)}


def test_tinyclips_have_the_published_number_of_parameters():
    for name, published in SIX.items():
        with torch.device("meta"):
            model = build_actionclip(f"{name}:random", MeanHead)
        sizes = {key: value.numel() / 1e6 for key, value in model.clip_model.named_parameters()}
        image = sum(size for key, size in sizes.items() if key.startswith("visual."))
        text = sum(sizes.values()) - image - sizes["token_embedding.weight"]
        assert (image, text, sum(sizes.values())) == pytest.approx(published, abs=6e-4)
        assert model.num_params_m() == pytest.approx(image + text)
        heads = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
        assert all(m.head_dim == 64 for m in heads)  # the number of parameters does not tell heads


def test_a_released_tinyclip_file_loads_strictly_and_computes_with_exact_gelu(tmp_path):
    state = build_clip_model(f"{EIGHT}:random")[0].state_dict()
    path = keep({"state_dict": {f"module.{key}": value for key, value in state.items()}},
                tmp_path / "released.pt")
    clip, tokenizer, _ = build_clip_model(f"{EIGHT}:{path}")
    assert same(state, clip.state_dict())
    tokens, frames = tokenizer(["a dog runs"]), torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert_near(clip.encode_text(tokens), hand_texts(state, tokens, 4, exact))
        assert_near(clip.encode_image((frames - MEAN) / STD), hand_images(state, frames, exact))


# ---- weights by name -----------------------------------------------------------------------------


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """A server that stands for all hosts of weights: ADDRESS is the file tmp_path/hosts/ADDRESS.
    Of files named broken.pt, it sends the first half."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, out):
            content = source.read()
            out.write(content[:len(content) // (2 if "broken" in self.path else 1)])

        def log_message(self, *_):
            pass

    folder = tmp_path / "hosts"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0),
                                             functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    for name in ("TINYCLIP_URL", "ACTIONCLIP_URL"):
        address = getattr(common, name).replace("https://", f"{server.url}/")
        monkeypatch.setattr(common, name, address)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()


def offer(tmp_path, address, content):
    path = tmp_path / "hosts" / address
    path.parent.mkdir(parents=True)
    return keep(content, path)


TINYCLIPS = "github.com/wkcn/TinyCLIP-model-zoo/releases/download/checkpoints"
ACTIONCLIPS = "download.openmmlab.com/mmaction/v1.0/projects/actionclip"


@pytest.mark.parametrize("name", SIX)
def test_tinyclips_are_downloaded_once(hosts, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(common.CLIP_CONFIGS, name, common.CLIP_CONFIGS["toy-small"])
    tag = "YFCC15M" if name in list(SIX)[:2] else "LAION400M"
    model = build_clip_model(f"{name}:random")[0].eval()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    offer(tmp_path, f"{TINYCLIPS}/{name}-{tag}.pt", {"state_dict": state})
    again = build_clip_model(f"{name}:{tag}")[0].eval()
    assert same(again.state_dict(), model.state_dict())
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.encode_image(image), model.encode_image(image))
    assert activation(again) is nn.GELU
    path = tmp_path / "hub" / "checkpoints" / f"{name}-{tag}.pt"
    assert re.findall("^downloading .*", capsys.readouterr().err, re.M) == [
        f"downloading {hosts.url}/{TINYCLIPS}/{name}-{tag}.pt to {path}, once ..."]
    hosts.shutdown()
    build_clip_model(f"{name}:{tag}")
    assert "downloading" not in capsys.readouterr().err


@pytest.mark.parametrize(("name", "T"), [("ViT-B-32", 8), ("ViT-B-16", 8), ("ViT-B-16", 16),
                                         ("ViT-B-16", 32)])
def test_actionclips_of_mmaction2_are_downloaded(hosts, tiny, tmp_path, monkeypatch, name, T):
    configs = open_clip.factory._MODEL_CONFIGS
    monkeypatch.setitem(configs, name, configs["ViT-B-32"])
    fusion = draw(fusion_shapes(96, layers=2), seed=1)
    fusion["frame_position_embeddings.weight"] = fusion["frame_position_embeddings.weight"][:T]
    state = {f"clip.{key}": value.half() for key, value in tiny.items()}
    state |= {f"adapter.{key}": value for key, value in fusion.items()}
    folder = f"actionclip_vit-base-p{name[-2:]}-res224-clip-pre_1x1x{T}_k400-rgb"
    file = offer(tmp_path, f"{ACTIONCLIPS}/{folder}/vit-b-{name[-2:]}-{T}f.pth",
                 {"state_dict": state})
    args = tinyclip_swap.parse(["--eval-only", f"{name}:kinetics400-{T}f"])
    model = tinyclip_swap.build_model("eval_only", args).cpu().eval()
    by_file = build_actionclip(name, checkpoint=file)
    assert same(model.state_dict(), by_file.state_dict())
    assert model.frames == by_file.frames == T
    assert model.clip_model.quick_gelu
    video, tokens = torch.rand(1, T, 3, 48, 48), model.tokenizer(["a dog runs"])
    state = {key: value.half().float() for key, value in tiny.items()}
    with torch.no_grad():
        frames = hand_images(state, video[0], quick)[None]
        assert_near(model.encode_video(video), hand_fusion(fusion, frames, HEADS))
        assert_near(model.encode_text(tokens), hand_texts(state, tokens, HEADS, quick))


def test_an_address_is_a_name_too(hosts, tmp_path):
    state = build_clip_model("toy-small:random")[0].state_dict()
    for folder in "ab":  # files of the same name
        offer(tmp_path, f"{folder}/model.pt", state)
        state = {key: value + 1 for key, value in state.items()}
    one, two = [build_clip_model(f"toy-small:{hosts.url}/{folder}/model.pt?download=true")[0]
                for folder in "ab"]
    assert same({key: value + 1 for key, value in one.state_dict().items()}, two.state_dict())


@pytest.mark.parametrize(("file", "reason"), [
    ("absent.pt", "404"), ("broken.pt", "broke off"), ("unreachable.pt", "refused")])
def test_a_download_that_fails_leaves_nothing_and_shows_the_way(hosts, tmp_path, file, reason):
    offer(tmp_path, "folder/broken.pt", torch.rand(99999))
    url = f"{'http://127.0.0.1:9' if reason == 'refused' else hosts.url}/folder/{file}"
    expected = f"{url} cannot.*{reason}.*/hub/checkpoints/.*{file}"
    with pytest.raises(BadInput, match=expected) as error:
        build_clip_model(f"toy-small:{url}")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


def test_without_a_network_the_tags_of_open_clip_fail_at_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["huggingface_hub.constants"], "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(common, "HUGGING_FACE_URL", "http://127.0.0.1:9")  # nothing answers there
    copy = functools.partial(open_clip.pretrained.hf_hub_download)
    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", copy)
    # as a file OpenAI's weights do not tell their activation: ViT-B-32:FILE would take GELU
    with pytest.raises(BadInput, match=r"ViT-B-32:openai.*http://127.0.0.1:9/timm/vit_base_patch32_"
                                       r"clip_224.openai/.*ViT-B-32-quickgelu:FILE") as error:
        build_clip_model("ViT-B-32:openai")
    assert "\n" not in str(error.value)

    # what is in the cache is used
    folder = tmp_path / "models--timm--vit_base_patch32_clip_224.openai"
    for part in ("refs", "snapshots/1"):
        (folder / part).mkdir(parents=True)
    (folder / "refs" / "main").write_text("1")
    save_file(tiny, folder / "snapshots" / "1" / "open_clip_model.safetensors")
    clip, _, _ = build_clip_model("ViT-B-32:openai")
    assert same(tiny, clip.state_dict())
    assert activation(clip) is QUICK


def test_a_file_wins_over_a_tag_of_the_same_name(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keep(tiny, "openai")
    assert same(tiny, build_clip_model("ViT-B-32:openai")[0].state_dict())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_prefixes_of_wrappers_are_removed(tmp_path, prefix, key):
    state = build_clip_model("toy-small:random")[0].state_dict()
    wrapped = {prefix + name: value for name, value in state.items()}
    path = keep({"epoch": 1, key: wrapped}, tmp_path / "a.pt")
    assert same(state, build_clip_model(f"toy-small:{path}")[0].state_dict())


# ---- errors that help ----------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "help"), [
    ("ViT-B-33", "ViT-B-32"), ("ViT-B/32:openai", "ViT-B-32"), ("toy-smal", "toy-small"),
    ("TinyCLIP-auto-ViT-63M-32-Text-31M", ".*".join(SIX)),
    ("ViT-B-32:laion3b", "openai.*laion2b_s34b_b79k"), ("ViT-B-16-SigLIP:random", "ViT-B-16"),
    ("ViT-B-32:no/such/file.pt", "no/such/file.pt"), (f"{EIGHT}:openai", "YFCC15M")])
def test_a_wrong_name_tag_or_file_is_told_with_what_would_be_right(spec, help):
    with pytest.raises(BadInput, match=help) as error:
        build_clip_model(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [
    b"not weights", b"", b"PK\x03\x04 broken", torch.ones(3), {}, {"a": 1}, {"state_dict": 3},
    {"model_state_dict": {"a": torch.ones(1)}}, {"a": {"b": torch.ones(1)}}],
    ids=["text", "empty", "broken zip", "tensor", "empty dict", "numbers", "no state",
         "half an ActionCLIP", "nested"])
@pytest.mark.filterwarnings("ignore")
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "a.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(BadInput, match=r"a\.pt"):
        build_clip_model(f"toy-small:{path}")


def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(tmp_path):
    ran = tmp_path / "ran"
    bomb = type("Bomb", (), {"__reduce__": lambda _: (open, (str(ran), "w"))})()
    with pytest.raises(BadInput, match=r"a\.pt"):
        build_clip_model(f"toy-small:{keep({'state_dict': bomb}, tmp_path / 'a.pt')}")
    assert not ran.exists()


def test_other_layouts_are_named(tmp_path):
    path = keep({"text_model.final_layer_norm.weight": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(BadInput, match=r"a\.pt .* layout of Hugging Face's transformers"):
        build_clip_model(f"toy-small:{path}")
    keep({"state_dict": {}, "meta": pytest.approx(1)}, path)  # as mmaction2's trainer: any objects
    with pytest.raises(BadInput, match=r"a\.pt .* any code.*weights_only=False\)\['state_dict'\]"):
        build_clip_model(f"toy-small:{path}")


def test_pixels_are_normalised_as_the_tag_says(tiny, tmp_path, monkeypatch):
    path = str(keep(tiny, tmp_path / "a.bin"))
    tag = {"file": path, "mean": (0., 0., 0.), "std": (1., 1., 1.)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED["ViT-B-32"], "plain", tag)
    model, video = build_actionclip("ViT-B-32:plain", MeanHead).eval(), torch.rand(2, 1, 3, 48, 48)
    with torch.no_grad():
        assert_near(model.encode_video(video), hand_images(tiny, video[:, 0] * STD + MEAN, exact))


# ---- the fusion head -----------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "size"), [(1, 1), (77, 1), (8, 1e-3)])
def test_the_fusion_head_equals_its_closed_form(frames, size):
    # its eps is 1e-12; the usual 1e-5 would be ten times the variance of embeddings of size 1e-3
    head, state = FusionHead(64, 4, layers=2).double().eval(), draw(fusion_shapes(64, 2))
    state = {name: value.double() for name, value in state.items()}
    state["frame_position_embeddings.weight"] *= size
    head.load_state_dict(state)
    f = torch.randn(3, frames, 64).double() * size
    with torch.no_grad():
        assert_near(head(f), hand_fusion(state, f, 4), 1e-9)


def test_an_untrained_fusion_head_has_the_official_spreads():
    torch.manual_seed(0)
    head, f = FusionHead(512, 8), torch.randn(16, 8, 512)
    with torch.no_grad():
        assert F.cosine_similarity(head(f), f.mean(1)).mean().item() == pytest.approx(.86, abs=.03)
    for name, value in head.state_dict().items():
        if name.endswith("in_proj_weight"):  # xavier: nn.Linear's init does not reach it
            assert value.std().item() == pytest.approx((2 / (512 + 3 * 512)) ** .5, rel=.02), name
        elif value.ndim > 1:
            assert value.std().item() == pytest.approx(.02, rel=.02), name
        else:
            assert (value == (1 if "ln_" in name and "weight" in name else 0)).all(), name


def test_only_positions_show_the_order_of_frames():
    torch.manual_seed(0)
    head, f = FusionHead(64, 1, layers=2, position_std=.5).eval(), torch.randn(2, 8, 64)
    with torch.no_grad():
        assert (head(f) - head(f.flip(1))).abs().max() > .01
        nn.init.zeros_(head.frame_position_embeddings.weight)
        torch.testing.assert_close(head(f), head(f.flip(1)))
        torch.testing.assert_close(MeanHead()(f), MeanHead()(f[:, torch.randperm(8)]))


@pytest.mark.parametrize(("name", "heads"), [("toy-large", 1), (EIGHT, 4), ("ViT-B-32", HEADS)])
def test_the_fusion_head_has_one_attention_head_per_64_of_the_text_tower(tiny, name, heads):
    # and not per 64 of D: of EIGHT D is 512 and the text tower 256 wide
    model = build_actionclip(f"{name}:random", one_layer)
    assert model.fusion.transformer.resblocks[0].attn.num_heads == heads


# ---- ActionCLIP ----------------------------------------------------------------------------------


def test_the_prompts_are_actionclips_sixteen_and_keep_strange_names():
    assert " | ".join(common.TEMPLATES) == (
        "a photo of action {} | a picture of action {} | Human action of {} | {}, an action | "
        "{} this is an action | {}, a video of action | Playing action of {} | {} | "
        "Playing a kind of action, {} | Doing a kind of action, {} | Look, the human is {} | "
        "Can you recognize the action of {}? | Video classification of {} | A video of {} | "
        "The man is {} | The woman is {}")
    model, names = build_actionclip("toy-small:random", one_layer), ["run", "{jump} 100% {}"]
    tokens = model.tokenize_classes(names)
    assert tokens.shape == (16, 2, 20)
    for prompt, row in zip(common.TEMPLATES, tokens, strict=True):
        for name, got in zip(names, row, strict=True):
            assert torch.equal(got, model.tokenizer([prompt.replace("{}", name, 1)])[0])


def test_widths_embeddings_and_gradients():
    model = build_actionclip("toy-small:random", one_layer)
    video, text, scale = model(torch.rand(4, 3, 3, 32, 32), model.tokenize_classes(["a"])[:4, 0])
    assert (model.embed_dim, model.crop_size, model.resize_to) == (48, 32, 37)
    assert video.shape == text.shape == (4, 48)
    assert scale.item() == pytest.approx(1 / .07, rel=1e-4)
    assert video.norm(dim=-1).std() > 1e-4  # not normalised
    (scale * video * text).sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_grad_checkpointing_saves_memory_and_gives_the_same_gradients():
    torch.manual_seed(0)
    model = build_actionclip("toy-small:random", one_layer)
    video, tokens = torch.rand(2, 3, 3, 32, 32), model.tokenize_classes(["a"])[:2, 0]
    gradients, sizes = [], []

    def count(x):
        sizes[-1] += x.numel()
        return x

    for enable in (False, True):
        sizes.append(0)
        model.zero_grad()
        model.clip_model.set_grad_checkpointing(enable)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            v, t, scale = model(video, tokens)
        (scale * v * t).sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert same(*gradients)
    assert sizes[1] < sizes[0] / 2


def test_gmac_counts_every_matrix():
    model, T, D = build_actionclip("toy-small:random", one_layer), 4, 48

    def block(length, width):  # projections, both products of attention, the MLP
        return 12 * length * width ** 2 + 2 * length ** 2 * width

    frame = 4 * D * 3 * 16 ** 2 + 2 * block(5, D) + D * D
    assert model.gmacs(T) == pytest.approx((T * frame + block(T, D)) / 1e9, rel=1e-6)


# ---- the toy CLIP --------------------------------------------------------------------------------


@torch.no_grad()
def test_a_toy_clip_trains_wherever_it_is_built(tmp_path):
    common._train_toy_clip("toy-small", tmp_path / "a.pt", steps=4, batch_size=2)
    start = build_clip_model("toy-small:random")[0].state_dict()
    moved = torch.load(tmp_path / "a.pt", weights_only=True)["state_dict"]
    assert not torch.equal(moved["visual.proj"], start["visual.proj"])
