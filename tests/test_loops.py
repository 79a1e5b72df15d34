"""Two trainers of the field, cut to the bone, before and after they take up MaskUpdater: README's diffs, run.

The loops keep the names that LESPS and BasicIRSTD use where a line changes; everything else is the least that trains.
"""

from __future__ import annotations

import difflib
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hmg_gpu import MaskUpdater, update
from hmg_gpu.data import load_folder, read_mask
from hmg_gpu.inference import predict
from hmg_gpu.losses import soft_iou_loss
from hmg_gpu.models import build_model
from hmg_gpu.training import Settings, Training

IMAGES = 4
MEAN, STD = 101.06385040283203, 34.619606018066406  # NUAA-SIRST in every trainer of the field


class Net(nn.Module):
    """What these trainers wrap a network in: it ends in a sigmoid, and brings its loss and its label update along."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build_model("acm", output_bias=0.0)

    def forward(self, img: Tensor) -> Tensor:
        return self.model(img).sigmoid()

    def loss(self, pred: Tensor, gt_mask: Tensor) -> Tensor:
        return soft_iou_loss(torch.logit(pred, eps=1e-6), gt_mask)

    def update_gt(self, pred: Tensor, gt_mask: Tensor, thresh_tb: float, thresh_k: float, size: list) -> Tensor:
        return torch.maximum(gt_mask, (pred > thresh_tb).float() * pred)


class Crops(Dataset):
    """Reads image and mask files anew for every item, as these trainers do in their workers."""

    def __init__(self, root: Path, masks: Path, patch: int):
        self.root, self.masks, self.patch = root, masks, patch
        self.names = (root / "img_idx" / f"train_{root.name}.txt").read_text().split()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = read_pair(self.root, self.masks, self.names[index])
        crop = torch.zeros(2, self.patch, self.patch)
        part = torch.stack((image, mask))[:, : self.patch, : self.patch]
        crop[:, : part.shape[1], : part.shape[2]] = part
        return crop[:1], crop[1:]


class WholeImages(Crops):
    """One padded image, its current mask, the file to write the next one to, and the image's size."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str, list[int]]:
        image, mask = read_pair(self.root, self.masks, self.names[index])
        height, width = image.shape
        padded = torch.zeros(2, 1, (height // 32 + 1) * 32, (width // 32 + 1) * 32)
        padded[0, 0, :height, :width], padded[1, 0, :height, :width] = image, mask
        return padded[0], padded[1], str(self.masks / f"{self.names[index]}.png"), [height, width]


def read_pair(root: Path, masks: Path, name: str) -> tuple[Tensor, Tensor]:
    image = np.array(Image.open(root / "images" / f"{name}.png").convert("I"), np.float32)
    mask = np.array(Image.open(masks / f"{name}.png"), np.float32) / 255
    return torch.from_numpy((image - MEAN) / STD), torch.from_numpy(mask)


def lesps_style(opt: SimpleNamespace) -> Net:
    opt.net = net = Net()
    shutil.copytree(opt.dataset_dir / f"masks_{opt.label_type}", opt.masks_update)
    train_loader = DataLoader(Crops(opt.dataset_dir, opt.masks_update, opt.patchSize), opt.batchSize, num_workers=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(opt.nEpochs):
        for img, gt_mask in train_loader:
            net.train()
            loss = net.loss(net.forward(img), gt_mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            opt.seen.append(gt_mask)
        update_loader = DataLoader(WholeImages(opt.dataset_dir, opt.masks_update, opt.patchSize), 1)
        net.eval()
        for img, gt_mask_update, update_dir, size in update_loader:
            pred = net.forward(img)
            pred = pred[:, :, : size[0], : size[1]]
            gt_mask_update = gt_mask_update[:, :, : size[0], : size[1]]
            update_mask = net.update_gt(pred, gt_mask_update, opt.LESPS_Tb, opt.LESPS_k, size)
            pixels = (update_mask[0, 0] * 255).detach().byte().numpy()
            Image.fromarray(pixels).save(update_dir[0])
    return net


def lesps_style_with_hmg(opt: SimpleNamespace) -> Net:
    opt.net = net = Net()
    shutil.copytree(opt.dataset_dir / f"masks_{opt.label_type}", opt.masks_update)
    opt.updater = MaskUpdater.from_folder(opt.dataset_dir, "train", points=f"masks_{opt.label_type}", device="cpu")
    opt.updater.export(opt.masks_update)
    train_loader = DataLoader(Crops(opt.dataset_dir, opt.masks_update, opt.patchSize), opt.batchSize, num_workers=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(opt.nEpochs):
        for img, gt_mask in train_loader:
            net.train()
            loss = net.loss(net.forward(img), gt_mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            opt.seen.append(gt_mask)
        update_loader = DataLoader(WholeImages(opt.dataset_dir, opt.masks_update, opt.patchSize), 1)
        net.eval()
        for img, gt_mask_update, update_dir, size in update_loader:
            pred = net.forward(img)
            pred = pred[:, :, : size[0], : size[1]]
            gt_mask_update = gt_mask_update[:, :, : size[0], : size[1]]
            update_mask = opt.updater.update_one(update_dir, pred, output="probabilities").masks
            pixels = (update_mask[0, 0] * 255).detach().byte().numpy()
            Image.fromarray(pixels).save(update_dir[0])
    return net


def basicirstd_style(opt: SimpleNamespace) -> Net:
    train_set = Crops(opt.dataset_dir, opt.dataset_dir / "masks", opt.patchSize)
    train_loader = DataLoader(dataset=train_set, batch_size=opt.batchSize, shuffle=True)
    net = Net()
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(opt.nEpochs):
        for _, (img, gt_mask) in enumerate(train_loader):
            pred = net.forward(img)
            loss = net.loss(pred, gt_mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            opt.seen.append(gt_mask)
    return net


def basicirstd_style_with_hmg(opt: SimpleNamespace) -> Net:
    train_set = Crops(opt.dataset_dir, opt.dataset_dir / "masks", opt.patchSize)  # noqa: F841
    opt.updater = updater = MaskUpdater.from_folder(opt.dataset_dir, "train", points="masks_centroid", device="cpu")
    train_loader = updater.loader(opt.batchSize, opt.patchSize, seed=opt.seed)
    net = Net()
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(opt.nEpochs):
        for _, (img, gt_mask) in enumerate(train_loader):
            pred = net.forward(img)
            loss = net.loss(pred, gt_mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            opt.seen.append(gt_mask)
        updater.update(net, output="probabilities")
    return net


@pytest.fixture
def opt(data_root: Path, tmp_path: Path) -> SimpleNamespace:
    """The settings of such a trainer, on the four smallest images of NUAA-SIRST's training set."""
    source, root = data_root / "NUAA-SIRST", tmp_path / "NUAA-SIRST"
    names = (source / "img_idx" / "train_NUAA-SIRST.txt").read_text().split()
    names = sorted(names, key=lambda name: (source / "images" / f"{name}.png").stat().st_size)[:IMAGES]
    for folder in ("images", "masks", "masks_centroid"):
        (root / folder).mkdir(parents=True)
        for name in names:
            shutil.copyfile(source / folder / f"{name}.png", root / folder / f"{name}.png")
    (root / "img_idx").mkdir()
    (root / "img_idx" / "train_NUAA-SIRST.txt").write_text("\n".join(names))
    return SimpleNamespace(
        dataset_dir=root,
        masks_update=tmp_path / "masks_update",
        label_type="centroid",
        patchSize=96,
        batchSize=2,
        nEpochs=2,
        seed=0,
        LESPS_Tb=0.5,
        LESPS_k=0.5,
        seen=[],
    )


def changed_lines(before: Callable, after: Callable) -> list[str]:
    lines = [inspect.getsource(one).replace("_with_hmg", "").replace("  # noqa: F841", "") for one in (before, after)]
    diff = list(difflib.unified_diff(lines[0].splitlines(), lines[1].splitlines(), lineterm="", n=0))[2:]
    return [line for line in diff if not line.startswith("@@")]


@pytest.mark.parametrize(
    ("before", "after"), [(lesps_style, lesps_style_with_hmg), (basicirstd_style, basicirstd_style_with_hmg)]
)
def test_at_most_five_lines_change(before: Callable, after: Callable) -> None:
    """The import is one more added line."""
    changed = changed_lines(before, after)
    assert sum(line.startswith("-") for line in changed) == 1
    assert 1 + len(changed) <= 5, changed


def test_the_loops_run_without_us(opt: SimpleNamespace) -> None:
    """Otherwise the test below would show nothing about trainers."""
    opt.nEpochs = 1
    assert isinstance(lesps_style(opt), Net) and isinstance(basicirstd_style(opt), Net)


def test_lesps_style(opt: SimpleNamespace) -> None:
    """Files in, files out: workers read the initial masks in epoch 1 and the hybrid ones of the updater after it."""
    net = lesps_style_with_hmg(opt)
    data = load_folder(opt.dataset_dir, "train")
    prediction = predict(net.model, data, batch_size=1, padding="lesps")
    hybrid = update(prediction, opt.updater.initial, data.points, sizes=data.sizes)
    assert torch.equal(opt.updater.masks, hybrid)
    assert not torch.equal(hybrid, opt.updater.initial)
    for row, (name, (height, width)) in enumerate(zip(data.names, data.sizes.tolist(), strict=True)):
        assert np.array_equal(read_mask(opt.masks_update / f"{name}.png"), hybrid[row, :height, :width].numpy())
    first, second = torch.cat(opt.seen[:2]), torch.cat(opt.seen[2:])
    for row, (height, width) in enumerate(data.sizes.clamp(max=opt.patchSize).tolist()):
        assert torch.equal(first[row, 0, :height, :width] > 0, opt.updater.initial[row, :height, :width])
    assert not torch.equal(first, second)


def test_basicirstd_style(opt: SimpleNamespace, tmp_path: Path) -> None:
    """Batches from the device; the masks are those of the library's own trainer with the same network, to the bit."""
    net = basicirstd_style_with_hmg(opt)
    data = load_folder(opt.dataset_dir, "train")
    own = Training(Settings(data=str(opt.dataset_dir)), data, None, tmp_path, lambda _: None)
    own.model = net.model
    assert torch.equal(opt.updater.initial, own.initial)
    assert torch.equal(opt.updater.masks, own._corrected())
    assert not torch.equal(opt.updater.masks, own.initial)
    assert net.training and len(opt.seen) == 2 * -(-IMAGES // opt.batchSize)
