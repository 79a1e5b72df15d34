"""A network of somebody's own (--model FILE.py:Class): trained, remembered, never started by a file."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refusal import refused
from tiny import write_folder
from torch import nn

import eval as script
import train
from hmg_gpu.commands.main import main as hmg_gpu
from hmg_gpu.models import build_model, check_model
from hmg_gpu.models.checkpoints import read_description, read_tensors, save_checkpoint
from hmg_gpu.models.custom import load_custom
from hmg_gpu.models.weights import load_model

FAST = ("--epochs", "1", "1", "--batch-size", "2", "--patch-size", "32", "--threads", "1", "--device", "cpu")
HEAD = "import torch\nfrom torch import nn\n"
NET = (
    HEAD
    + """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, images):
        return self.head(self.body(images))
"""
)
PRIOR = NET + "\n    def output_convolutions(self):\n        return [self.head]\n"
HEADS = NET.replace("return ", "return self.head(images.expand(-1, 4, -1, -1)), ")


def write(folder: Path, content: str, name: str = "net.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)
    return folder / name


def returning(expression: str) -> str:
    """A file whose network gives something of x, the logits it should have given."""
    return NET.replace(
        "return self.head(self.body(images))", f"x = self.head(self.body(images))\n        return {expression}"
    )


@pytest.fixture(autouse=True)
def machine() -> None:
    yield
    torch.set_flush_denormal(False)  # which train.py sets


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A command's exit code, and what it said on stderr (one line where it refused)."""

    def run(main: Callable[[list[str]], int], *arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        text = capsys.readouterr().err
        assert (code, text.count("\n")) in ((0, 0), (130, 0), (2, 1)), text
        return code, text

    return run


# ---- from training to masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [NET, PRIOR, HEADS], ids=["plain", "with a prior", "heads"])
@pytest.mark.parametrize("folder", ["mine", "my nets [v2]"])
def test_a_network_of_ones_own(content: str, folder: str, data: Path, command, tmp_path: Path) -> None:
    model = f"{write(tmp_path / folder, content)}:Net"
    out = tmp_path / "my run"
    assert command(train.main, "--data", data, *FAST, "--model", model, "--out", out) == (0, "")
    for name in ("last", "stage1", "stage2"):
        assert read_description(out / f"{name}.safetensors")["settings"]["model"] == model
    assert json.loads((out / "results.json").read_text())["results"].keys() == {"masks", "stage 1", "stage 2"}

    weights = out / "stage2.safetensors"
    images = ("--images", data / "images", "--points", data / "masks_centroid")
    for main, *arguments in (
        (script.main, "detector", "--data", data, "--no-plots", "--out", tmp_path / "detector"),
        (script.main, "predict", data / "images", "--out", tmp_path / "predict"),
        (hmg_gpu, "masks", *images, "--out", tmp_path / "masks"),
    ):
        code, text = command(main, *arguments, "--checkpoint", weights)
        assert code == 2 and str(weights) in text and "code that a file may not start by itself" in text
        cure = text.strip().partition("add ")[2]
        assert shlex.split(cure) == ["--model", model]  # as it stands, to be copied
        assert not Path(arguments[-1]).exists()
        assert command(main, *arguments, "--checkpoint", weights, *shlex.split(cure)) == (0, "")
    found = json.loads((tmp_path / "detector" / "detector.json").read_text())
    assert found["network"]["model"] == "Net" and found["network"]["trained"]["settings"]["model"] == model
    trained = json.loads((out / "results.json").read_text())["results"]["stage 2"]
    assert {key: found["result"][key] for key in ("intersection", "union")} == {
        key: trained[key] for key in ("intersection", "union")
    }


def test_a_run_resumes_with_its_network_alone(data: Path, command, tmp_path: Path, monkeypatch) -> None:
    model, out = f"{write(tmp_path / 'nets', NET)}:Net", tmp_path / "run"
    whole = tmp_path / "whole"
    options = ("--data", data, *FAST, "--model", model)
    assert command(train.main, *options, "--out", whole)[0] == 0
    plain = train.Screen.on_step

    def on_step(screen: train.Screen, event: dict) -> None:
        plain(screen, event)
        if (event["stage"], event["step"]) == (1, 2):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Screen, "on_step", on_step)
        with pytest.raises(KeyboardInterrupt):
            command(train.main, *options, "--out", out)
    code, text = command(train.main, "--resume", out)
    assert code == 2 and "code that a run may not start by itself" in text
    cure = shlex.split(text.strip().partition("add ")[2])
    assert cure == ["--model", model]
    other = f"{write(tmp_path / 'others', NET)}:Net"
    for wrong in (other, "acm"):
        assert command(train.main, "--resume", out, "--model", wrong) == (2, text)
    more = ("--resume", out, *cure, "--seed", 1)
    assert "takes every setting from the run" in command(train.main, *more)[1]
    assert command(train.main, "--resume", out, *cure, "--threads", "1", "--device", "cpu") == (0, "")
    first, second = (read_tensors(folder / "stage2.safetensors") for folder in (whole, out))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    acm = tmp_path / "acm"
    assert command(train.main, "--data", data, "--model", "acm", *FAST, "--out", acm)[0] == 0
    for wrong in (model, "dnanet"):
        code, text = command(train.main, "--resume", acm, "--model", wrong)
        assert code == 2 and "takes every setting from the run" in text
    assert command(train.main, "--resume", acm, "--model", "acm") == (0, "")


def test_weights_of_another_network(data: Path, command, tmp_path: Path) -> None:
    model, out = f"{write(tmp_path / 'nets', NET)}:Net", tmp_path / "run"
    assert command(train.main, "--data", data, *FAST, "--model", model, "--out", out)[0] == 0
    detector = ("detector", "--data", data, "--no-plots", "--out", tmp_path / "out", "--checkpoint")
    code, text = command(script.main, *detector, out / "stage1.safetensors", "--model", "acm")
    assert code == 2 and "made for another model" in text
    wider = f"{write(tmp_path / 'wide', NET.replace('(4', '(6').replace('1, 4', '1, 6'))}:Net"
    code, text = command(script.main, *detector, out / "stage1.safetensors", "--model", wider)
    assert code == 2 and "has shape" in text


def test_the_report_takes_a_network_of_ones_own(data: Path, command, tmp_path: Path) -> None:
    model, out = f"{write(tmp_path / 'nets', NET)}:Net", tmp_path / "run"
    assert command(train.main, "--data", data, *FAST, "--model", model, "--out", out)[0] == 0
    report = (
        "paper",
        "--data",
        data,
        "--no-plots",
        "--out",
        tmp_path / "out",
        "--checkpoint",
        out / "stage2.safetensors",
    )
    code, text = command(script.main, *report)
    assert code == 2 and "--model" in text
    assert command(script.main, *report, "--model", model)[0] == 0
    entries = json.loads((tmp_path / "out" / "paper.json").read_text())["entries"]
    (row,) = [entry for entry in entries if (entry["table"], entry["row"]) == ("Table 1", "HMG") and entry["ours"]]
    assert row["our_model"] == "Net" and "--model" in row["command"]


def test_a_file_never_starts_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a checkpoint calls its network, nothing of it is run, and what it says stays on one line."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "open('started', 'w')\n", "evil.py")
    tensors = {f"model.{name}": value for name, value in build_model("acm").state_dict().items()}
    odd = ("evil.py:Net", "evil.py:Net\x1b[31m\nerror: all is well", "e" * 5000 + ".py:Net")
    for number, name in enumerate(odd):
        path = tmp_path / f"{number}.safetensors"
        save_checkpoint(path, tensors, {"settings": {"model": name}, "normalisation": [1, 2]})
        with pytest.raises(Exception, match="may not start by itself") as caught:
            load_model(path)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 800
    (tmp_path / "run").mkdir()
    for settings in ({"model": odd[1]}, ["model"], None):
        save_checkpoint(tmp_path / "run" / "last.safetensors", tensors, {"settings": settings})
        options = train.parse(["--resume", str(tmp_path / "run")])
        with pytest.raises(Exception, match=r"run|settings") as caught:
            train.choose_settings(options, train.Console(), train.Team())
        assert str(caught.value).isprintable()
    assert not (tmp_path / "started").exists()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kind", "parts"),
    [
        (None, "Net", ("no such file",)),
        (NET, "Nets", ("has no class Nets that is a torch.nn.Module",)),
        (NET, "", ("expected the name of a class behind the colon",)),
        (NET, "a-b", ("expected the name of a class behind the colon",)),
        (NET, "torch", ("has no class torch that is a torch.nn.Module",)),  # a module, but of Python
        ("class Net:\n    pass\n", "Net", ("has no class Net that is a torch.nn.Module",)),
        (HEAD + "Net = nn.Conv2d(1, 1, 1)\n", "Net", ("has no class Net that is a torch.nn.Module",)),
        (
            "import no_such_package_here\n",
            "Net",
            ("fails (ModuleNotFoundError: No module named 'no_such_package_here')",),
        ),
        ("class Net(\n", "Net", ("fails (SyntaxError: ",)),
        ("raise ValueError('in\\ntwo lines')\n", "Net", ("fails (ValueError: in two lines)",)),
        ("import sys\nsys.exit(3)\n", "Net", ("fails (SystemExit: 3)",)),
        (
            NET.replace("__init__(self)", "__init__(self, width)"),
            "Net",
            ("Net() fails (TypeError", "without arguments"),
        ),
        (NET.replace("nn.ReLU()", "nn.Relu()"), "Net", ("Net() fails (AttributeError",)),
        (
            HEAD + "class Net(nn.Module):\n    pass\n",
            "Net",
            ("fails on float images [2, 1, 64, 64]", "NotImplementedError"),
        ),
        (returning("x.no_such_method()"), "Net", ("fails on float images [2, 1, 64, 64]", "multiples of 32")),
        (
            returning("x[:, :, ::2, ::2]"),
            "Net",
            ("expected float logits [2, 1, 64, 64]", "got torch.float32 [2, 1, 32, 32]"),
        ),
        (returning("torch.cat((x, x), 1)"), "Net", ("expected float logits", "got torch.float32 [2, 2, 64, 64]")),
        (returning("x[:, 0]"), "Net", ("got torch.float32 [2, 64, 64]",)),
        (returning("(x, x[:, 0])"), "Net", ("got torch.float32 [2, 64, 64]",)),
        (returning("x > 0"), "Net", ("got torch.bool [2, 1, 64, 64]",)),
        (returning("{'mask': x}"), "Net", ("expected float logits", "got dict")),
        (returning("None"), "Net", ("got NoneType",)),
        (returning("x.sigmoid()"), "Net", ("lie within 0 and 1", "leave the sigmoid out")),
        (
            returning("nn.functional.interpolate(nn.Sigmoid()(x[..., ::2, ::2]), scale_factor=2)"),
            "Net",
            ("leave the sigmoid",),
        ),
        (returning("torch.cat((x, -x), 1).softmax(1)[:, :1]"), "Net", ("leave the sigmoid out",)),
        (returning("[x.sigmoid(), x.sigmoid()]"), "Net", ("leave the sigmoid out",)),
    ],
)
def test_a_network_that_does_not_fit(content: str | None, kind: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    if content is not None:
        write(tmp_path, content)
    refused(lambda: build_model(f"{path}:{kind}"), f"model {path}:{kind}: ", *parts)


def test_train_refuses_before_anything_is_written(data: Path, command, tmp_path: Path) -> None:
    path = write(tmp_path / "nets", returning("x.sigmoid()"))
    for model in (f"{path}:Net", f"{path}:Nets", f"{tmp_path / 'no.py'}:Net", str(path)):
        code, text = command(train.main, "--data", data, *FAST, "--model", model, "--out", tmp_path / "run")
        assert code == 2 and str(model) in text
        assert not (tmp_path / "run").exists()
    assert "FILE.py:Class" in text


@pytest.mark.parametrize(
    "expression", ["x", "(x, x)", "[x, 2 * x]", "x.half().float()", "x * x.sigmoid()", "x.abs() * 1e-6"]
)
def test_what_is_taken(expression: str, tmp_path: Path) -> None:
    """Heads, gates, and logits that happen to lie within 0 and 1: only a sigmoid at the end is refused."""
    network = load_custom(f"{write(tmp_path, returning(expression))}:Net")
    assert network.training and type(network).__name__ == "Net"
    assert all(value.grad is None for value in network.parameters())


@pytest.mark.parametrize("name", ["acm", "alcnet", "unet"])
def test_no_draw_of_a_known_network_is_taken_for_probabilities(name: str, tmp_path: Path) -> None:
    """Of ACM about half the draws of PyTorch's initialisation give logits within 0 and 1 alone."""
    path = write(tmp_path, f"from hmg_gpu.models import NETWORKS\n\nclass Net(NETWORKS[{name!r}]):\n    pass\n")
    within = 0
    for seed in range(8):
        torch.manual_seed(seed)
        network = load_custom(f"{path}:Net").eval()
        with torch.no_grad():
            values = network(torch.randn(2, 1, 64, 64))
        within += bool(values.min() >= 0 and values.max() <= 1)
    assert within or name != "acm"  # the case means something


# ---- how it is built ------------------------------------------------------------------------------------------------


def test_the_prior_is_set_where_the_output_is_known(tmp_path: Path) -> None:
    plain, prior = (f"{write(tmp_path / str(n), content)}:Net" for n, content in enumerate((NET, PRIOR)))
    assert build_model(prior).head.bias.item() == -4
    assert build_model(prior, output_bias=1.5).head.bias.item() == 1.5
    torch.manual_seed(3)
    own = load_custom(plain).head.bias.item()
    torch.manual_seed(3)
    assert build_model(plain).head.bias.item() == own
    torch.manual_seed(3)
    assert build_model(prior, output_bias=None).head.bias.item() == own


def test_the_trial_takes_no_random_number(tmp_path: Path) -> None:
    """After building, the generator stands where the construction alone leaves it; no weight has changed."""
    path = write(tmp_path, NET.replace("nn.ReLU()", "nn.ReLU(), nn.Dropout(0.5)"))
    torch.manual_seed(11)
    network = load_custom(f"{path}:Net")
    after = torch.get_rng_state()
    torch.manual_seed(11)
    again = type(network)()
    assert torch.equal(torch.get_rng_state(), after)
    found, wanted = network.state_dict(), again.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


def test_its_own_folder_can_be_imported_from(tmp_path: Path) -> None:
    """As when Python runs the file, but behind all others; a file that fails leaves the search path as it was."""
    write(tmp_path / "my nets", "WIDTH = 6\n", "blocks_of_mine.py")
    path = write(
        tmp_path / "my nets",
        "from blocks_of_mine import WIDTH\n" + NET.replace("(4", "(WIDTH").replace("1, 4", "1, WIDTH"),
    )
    before = list(sys.path)
    try:
        assert load_custom(f"{path}:Net").head.in_channels == 6
        assert sys.path == [*before, str(path.parent)]
        before = list(sys.path)
        broken = write(tmp_path / "broken", "from no_blocks_here import WIDTH\n" + NET)
        refused(lambda: load_custom(f"{broken}:Net"), "No module named 'no_blocks_here'")
        assert sys.path == before
    finally:
        sys.modules.pop("blocks_of_mine", None)
        sys.path.remove(str(path.parent))


def test_its_own_folder_can_be_imported_from_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    write(tmp_path, "def gain():\n    return 2.0\n", "late_sibling.py")
    late = "        from late_sibling import gain\n"
    content = NET.replace("        super().__init__()\n", "        super().__init__()\n" + late)
    content = content.replace("        return self.head", late + "        return gain() * self.head")
    network = load_custom(f"{write(tmp_path, content)}:Net")
    assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 1, 32, 32)
    assert sys.path[0] != str(tmp_path)  # never before what was there


def test_a_name_is_checked_without_running_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "raise ValueError\n")
    check_model(f"{path}:Net")
    refused(lambda: check_model(f"{tmp_path / 'no.py'}:Net"), "no such file")
    refused(lambda: check_model("net.py"), "unknown model 'net.py'", "FILE.py:Class")
    assert isinstance(build_model("unet"), nn.Module)
