"""Other people's trainers with MaskUpdater in them: what they do to data, networks and masks, rebuilt as loops.

LESPS and BasicIRSTD keep their names where README's diffs change a line; everything else is the least that trains.
"""

from __future__ import annotations

import ast
import inspect
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZES, write_folder
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hmg_gpu import MaskUpdater, update
from hmg_gpu.data import NORMALISATION, load_folder, read_mask
from hmg_gpu.models.losses import soft_iou_loss
from hmg_gpu.models.predict import predict
from hmg_gpu.training.loop import Training
from hmg_gpu.training.settings import Settings

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where these trainers move everything: .cuda()
NAME = "NUAA-SIRST"
IMG_NORM_CFG = {"mean": 101.06385040283203, "std": 34.619606018066406}  # its entry in both trainers' tables


class Model(nn.Module):
    """Bright pixels are foreground; batch norm and dropout tell the modes apart. Gives logits."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.scale, self.norm, self.drop = nn.Conv2d(channels, 1, 1), nn.BatchNorm2d(1), nn.Dropout(0.1)
        nn.init.constant_(self.scale.weight, 2.0 / channels)
        nn.init.constant_(self.scale.bias, 0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.scale(self.drop(images)))


class Net(nn.Module):
    """These trainers' wrapper: built for a mode, ends in a sigmoid, brings its loss and its label update along.

    As DNANet does, it returns a list of heads where it was built for training, in train mode and in eval mode.
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.model, self.mode = Model(), mode

    def forward(self, img: Tensor) -> Tensor | list[Tensor]:
        out = self.model(img).sigmoid()
        return [1 - out.detach(), out] if self.mode == "train" else out

    def loss(self, preds: list[Tensor], gt_mask: Tensor) -> Tensor:
        return soft_iou_loss(torch.logit(preds[-1], eps=1e-6), gt_mask)

    def update_gt(self, pred: Tensor, gt_masks: Tensor, thresh_Tb: float, thresh_k: float, size: list) -> Tensor:
        return torch.maximum(gt_masks, (pred > thresh_Tb).float() * pred)


# ---- LESPS ----------------------------------------------------------------------------------------------------------


class LespsFiles(Dataset):
    """Joins the two parts of the path as strings; reads images and masks anew for every item, in a worker."""

    def __init__(self, opt: SimpleNamespace):
        self.dataset_dir, self.masks_update = opt.dataset_dir + opt.dataset_name, opt.masks_update
        self.patch_size, self.label_type = opt.patchSize, opt.label_type
        self.train_list = Path(f"{self.dataset_dir}/img_idx/train_{opt.dataset_name}.txt").read_text().splitlines()

    def __len__(self) -> int:
        return len(self.train_list)

    def read(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        name = self.train_list[idx]
        img = np.array(Image.open(f"{self.dataset_dir}/images/{name}.png").convert("I"), np.float32)
        if isinstance(self.masks_update, str):
            mask = np.array(Image.open(f"{self.masks_update}/{name}.png"), np.float32) / 255
        else:
            mask = self.masks_update[idx]
        return (img - IMG_NORM_CFG["mean"]) / IMG_NORM_CFG["std"], mask


class TrainSetLoader(LespsFiles):
    """Making one puts the point labels into the folder of masks, whatever was there."""

    def __init__(self, opt: SimpleNamespace):
        super().__init__(opt)
        if isinstance(self.masks_update, str):
            shutil.rmtree(self.masks_update, ignore_errors=True)
            shutil.copytree(f"{self.dataset_dir}/masks_{self.label_type}", self.masks_update)

    def __getitem__(self, idx: int) -> tuple[Tensor, Tensor]:
        patch = np.zeros((2, self.patch_size, self.patch_size), np.float32)
        part = np.stack(self.read(idx))[:, : self.patch_size, : self.patch_size]
        patch[:, : part.shape[1], : part.shape[2]] = part
        return torch.from_numpy(patch[:1]), torch.from_numpy(patch[1:])


class UpdateMask(LespsFiles):
    """A whole image and its mask, padded; where the next mask goes: a path, or an index into the list; the size."""

    def __getitem__(self, idx: int) -> tuple[Tensor, Tensor, str | int, list[int]]:
        img, mask = self.read(idx)
        h, w = img.shape
        margin = ((0, (h // 32 + 1) * 32 - h), (0, (w // 32 + 1) * 32 - w))
        path = f"{self.masks_update}/{self.train_list[idx]}.png"
        img, mask = (torch.from_numpy(np.pad(part, margin)[None]) for part in (img, mask))
        return img, mask, path if isinstance(self.masks_update, str) else idx, [h, w]


def to_pil_image(pic: Tensor) -> Image.Image:
    """What torchvision's ToPILImage makes of float [1, h, w]."""
    return Image.fromarray(pic.mul(255).byte().numpy()[0])


def lesps(opt: SimpleNamespace, *, hmg: bool) -> None:
    train_set = TrainSetLoader(opt)
    if hmg:
        opt.updater = MaskUpdater.from_folder(
            opt.dataset_dir + opt.dataset_name, "train", points="masks_" + opt.label_type
        )
        opt.updater.export(opt.masks_update)
    train_loader = DataLoader(dataset=train_set, num_workers=1, batch_size=opt.batchSize)
    net = Net(mode="train").to(DEVICE)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-4)
    for _ in range(opt.nEpochs):
        for img, gt_mask in train_loader:
            net.train()
            opt.seen.append(gt_mask)
            img, gt_mask = img.to(DEVICE), gt_mask.to(DEVICE)
            loss = net.loss(net.forward(img), gt_mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        opt.state = {name: value.clone() for name, value in net.state_dict().items()}
        lesps_update_gt_mask(opt, opt.LESPS_Tb, opt.LESPS_k, hmg=hmg)


def lesps_update_gt_mask(opt: SimpleNamespace, thresh_Tb: float, thresh_k: float, *, hmg: bool) -> None:
    """By another network, built for testing, image by image and with gradients on."""
    update_loader = DataLoader(dataset=UpdateMask(opt), num_workers=1, batch_size=1, shuffle=False)
    net = Net(mode="test").to(DEVICE)
    net.load_state_dict(opt.state)
    net.eval()
    for img, gt_mask_update, update_dir, size in update_loader:
        img, gt_mask_update = img.to(DEVICE), gt_mask_update.to(DEVICE)
        pred = net.forward(img)
        pred = pred[:, :, : size[0], : size[1]]
        gt_mask_update = gt_mask_update[:, :, : size[0], : size[1]]
        if hmg:
            update_mask = opt.updater.update_one(update_dir, pred, "probabilities").masks
        else:
            update_mask = net.update_gt(pred, gt_mask_update, thresh_Tb, thresh_k, size)
        if isinstance(update_dir, Tensor):
            opt.masks_update[update_dir] = update_mask[0, 0, : size[0], : size[1]].cpu().detach().numpy()
        else:
            img_save = to_pil_image(update_mask[0, :, : size[0], : size[1]].cpu())
            img_save.save(update_dir[0])
        opt.keys.append(update_dir)


# ---- BasicIRSTD -----------------------------------------------------------------------------------------------------


class BasicFiles(Dataset):
    """Joins the path by "/"; half of its crops lie around a target."""

    def __init__(self, opt: SimpleNamespace):
        self.dataset_dir = opt.dataset_dir + "/" + opt.dataset_name
        self.patch_size, self.img_norm_cfg = opt.patchSize, opt.img_norm_cfg
        self.train_list = Path(f"{self.dataset_dir}/img_idx/train_{opt.dataset_name}.txt").read_text().splitlines()

    def __len__(self) -> int:
        return len(self.train_list)

    def __getitem__(self, idx: int) -> tuple[Tensor, Tensor]:
        img, mask = (
            np.array(Image.open(f"{self.dataset_dir}/{kind}/{self.train_list[idx]}.png"), np.float32)
            for kind in ("images", "masks")
        )
        patch = np.zeros((2, 64, 64), np.float32)
        patch[0, : img.shape[0], : img.shape[1]] = (img - self.img_norm_cfg["mean"]) / self.img_norm_cfg["std"]
        patch[1, : img.shape[0], : img.shape[1]] = mask / 255
        y, x = (random.choice(axis) for axis in np.where(patch[1] > 0)) if random.random() < 0.5 else (0, 0)
        y, x = (min(max(0, at - self.patch_size // 2), 64 - self.patch_size) for at in (y, x))
        patch = torch.from_numpy(patch[:, y : y + self.patch_size, x : x + self.patch_size])
        return patch[:1], patch[1:]


def basicirstd(opt: SimpleNamespace, *, hmg: bool) -> nn.Module:
    train_set = BasicFiles(opt)
    if hmg:
        updater = MaskUpdater.from_folder(
            opt.dataset_dir + "/" + opt.dataset_name, normalisation=tuple(train_set.img_norm_cfg.values())
        )
        train_loader = updater.loader(opt.batchSize, opt.patchSize, seed=opt.seed, positive=0.5)
        opt.updater = updater
    else:
        train_loader = DataLoader(dataset=train_set, num_workers=opt.threads, batch_size=opt.batchSize, shuffle=True)
    net = Net(mode="train").to(DEVICE)
    net.train()  # once, before the loop
    net = torch.nn.DataParallel(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-4)
    for _ in range(opt.nEpochs):
        for img, gt_mask in train_loader:
            img, gt_mask = img.to(DEVICE), gt_mask.to(DEVICE)
            if img.shape[0] == 1:
                opt.skipped += 1
                continue
            opt.modes.append([module.training for module in net.modules()])
            opt.seen.append(gt_mask)
            pred = net.forward(img)
            loss = net.module.loss(pred, gt_mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if hmg:
            updater.update(net, "probabilities", head=-1)
    return net


# ---- README's diffs -------------------------------------------------------------------------------------------------


def test_the_loops_have_the_lines_of_the_readme() -> None:
    """Four lines added, one removed, the import among them; what README shows is what runs below."""
    blocks = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block, loops in zip(blocks, ((lesps, lesps_update_gt_mask), (basicirstd,)), strict=True):
        there = {ast.unparse(node) for loop in loops for node in ast.walk(ast.parse(inspect.getsource(loop)))}
        there.add("from hmg_gpu import MaskUpdater")
        added, removed = ([line[1:].strip() for line in block.splitlines() if line[0] == sign] for sign in "+-")
        assert (len(added), len(removed)) == (4, 1)
        for line in added + removed:
            assert ast.unparse(ast.parse(line)) in there, line


# ---- the loops, run -------------------------------------------------------------------------------------------------


@pytest.fixture
def opt(tmp_path: Path) -> SimpleNamespace:
    """The options of these trainers, and what a loop saw."""
    write_folder(tmp_path / "datasets" / NAME, name=NAME)
    return SimpleNamespace(
        dataset_dir=f"{tmp_path}/datasets/",
        dataset_name=NAME,
        masks_update=f"{tmp_path}/{NAME}_DNANet_LESPS_centroid_Tue_Jul_18_00:33:14_2023",
        label_type="centroid",
        img_norm_cfg=IMG_NORM_CFG,
        patchSize=32,
        batchSize=2,
        threads=1,
        nEpochs=2,
        seed=42,
        LESPS_Tb=0.5,
        LESPS_k=0.5,
        seen=[],
        keys=[],
        modes=[],
        skipped=0,
    )


def list_cache(opt: SimpleNamespace) -> list[np.ndarray]:
    """LESPS with --cache True: masks in a list, one array an image."""
    folder = Path(opt.dataset_dir + opt.dataset_name, f"masks_{opt.label_type}")
    return [np.array(Image.open(folder / f"train{row}.png"), np.float32) / 255 for row in range(len(SIZES))]


def test_the_loops_run_without_us(opt: SimpleNamespace) -> None:
    """Otherwise the tests below would show nothing about trainers."""
    opt.nEpochs = 1
    lesps(opt, hmg=False)
    opt.masks_update = list_cache(opt)
    lesps(opt, hmg=False)
    basicirstd(opt, hmg=False)
    assert len(opt.keys) == 2 * len(SIZES) and opt.skipped == 0


@pytest.mark.parametrize("cache", ["files", "list"])
def test_lesps(cache: str, opt: SimpleNamespace, recwarn: pytest.WarningsRecorder) -> None:
    """Workers read the initial masks in epoch 1 and the hybrid ones after it, from files or from the list."""
    if cache == "list":
        opt.masks_update = kept = list_cache(opt)
    lesps(opt, hmg=True)
    if cache == "list":
        assert opt.masks_update is kept
        assert all(key.tolist() == [row % 6] and key.dtype == torch.int64 for row, key in enumerate(opt.keys))
    else:
        assert all(isinstance(key, (tuple, list)) and len(key) == 1 for key in opt.keys)
        assert opt.keys[7][0] == f"{opt.masks_update}/train1.png"
    data = load_folder(opt.dataset_dir + opt.dataset_name, "train").to(DEVICE)
    assert (data.mean, data.std) == tuple(IMG_NORM_CFG.values())
    net = Net(mode="test").to(DEVICE)
    net.load_state_dict(opt.state)
    hybrid = update(predict(net.model, data, padding="lesps"), opt.updater.initial, data.points, sizes=data.sizes)
    assert torch.equal(opt.updater.masks, hybrid)
    assert not torch.equal(hybrid, opt.updater.initial)
    for row, (height, width) in enumerate(SIZES):
        wanted = hybrid[row, :height, :width].cpu().numpy()
        found = kept[row] if cache == "list" else read_mask(f"{opt.masks_update}/train{row}.png")
        assert np.array_equal(found, wanted) and wanted.any()
    first, second = torch.cat(opt.seen[:3]), torch.cat(opt.seen[3:])
    for row, (height, width) in enumerate(data.sizes.clamp(max=opt.patchSize).tolist()):
        assert torch.equal(first[row, 0, :height, :width] > 0, opt.updater.initial[row, :height, :width].cpu())
        assert set(second[row].unique().tolist()) <= {0.0, 1.0}
    assert not torch.equal(first, second)
    assert not [warning for warning in recwarn if "guard" in str(warning.message)]


def test_lesps_in_the_place_of_its_point_labels(opt: SimpleNamespace) -> None:
    """No line of LESPS changed: a folder masks_NAME beside masks_centroid is what --label_type NAME reads."""
    root = Path(opt.dataset_dir + opt.dataset_name)
    updater = MaskUpdater.from_folder(root)
    updater.export(root / "masks_hmg")
    opt.label_type, opt.nEpochs = "hmg", 1
    lesps(opt, hmg=False)
    for row, mask in enumerate(torch.cat(opt.seen)):
        height, width = (min(side, opt.patchSize) for side in SIZES[row])
        assert torch.equal(mask[0, :height, :width] > 0, updater.initial[row, :height, :width].cpu())


@pytest.mark.parametrize("mode", ["train", "test"])
def test_basicirstd(mode: str, opt: SimpleNamespace, tmp_path: Path) -> None:
    """Batches from the device; the masks are those of the library's own trainer with the same network, to the bit."""
    opt.dataset_dir = opt.dataset_dir.rstrip("/")
    net = basicirstd(opt, hmg=True)
    updater = opt.updater
    data = load_folder(opt.dataset_dir + "/" + opt.dataset_name, "train").to(DEVICE)
    own = Training(Settings(data=opt.dataset_dir + "/" + opt.dataset_name), data, None, tmp_path, lambda _: None)
    own.model = net.module.model
    assert torch.equal(updater.initial, own.updater.initial) and torch.equal(own.masks, own.updater.initial)
    own.correct()
    assert torch.equal(updater.masks, own.masks) and not torch.equal(updater.masks, updater.initial)
    net.module.mode = mode  # a list of heads, or one tensor: the same call takes both
    updater.update(net, "probabilities", head=-1)
    assert torch.equal(updater.masks, own.masks)
    assert len(opt.seen) == opt.nEpochs * 3 and opt.skipped == 0
    assert all(all(modes) for modes in opt.modes)  # nobody calls net.train() again after an update


def test_basicirstd_never_skips_a_batch_of_ours(opt: SimpleNamespace) -> None:
    """It skips batches of one image, for batch norm; our last batch is filled up instead."""
    opt.batchSize, opt.nEpochs = 5, 1
    basicirstd(opt, hmg=False)
    assert opt.skipped == 1
    basicirstd(opt, hmg=True)
    assert opt.skipped == 1 and [len(masks) for masks in opt.seen[-2:]] == [5, 5]


def test_basicirstd_normalises_by_its_own_table(opt: SimpleNamespace) -> None:
    """For a set that neither table has it takes train and test together; the network must go on seeing that."""
    opt.img_norm_cfg, opt.nEpochs = {"mean": 100.0, "std": 32.0}, 1
    basicirstd(opt, hmg=True)
    data = opt.updater.data
    assert (data.mean, data.std) == (100.0, 32.0) != NORMALISATION[NAME]
    images, _ = next(iter(opt.updater.loader(6, 48)))
    pixels = (images * 32 + 100).round()
    assert set(pixels.unique().tolist()) <= {*data.images.unique().tolist(), 100.0}  # 0 after normalisation: padding


# ---- others ---------------------------------------------------------------------------------------------------------


def train_epoch(net: nn.Module, batches: Iterator, optimizer: torch.optim.Optimizer, channels: int = 1) -> None:
    for images, masks in batches:
        loss = soft_iou_loss(net(images.expand(-1, channels, -1, -1)), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make_updater(opt: SimpleNamespace) -> MaskUpdater:
    return MaskUpdater.from_folder(opt.dataset_dir + opt.dataset_name)


def test_a_plain_loop_with_three_channels(opt: SimpleNamespace) -> None:
    """The same masks as those of the network of one channel that does the same."""
    updater, net = make_updater(opt), Model(channels=3).to(DEVICE)
    train_epoch(net, updater.loader(2, 32, positive=0.5), torch.optim.Adam(net.parameters(), lr=1e-3), channels=3)
    updater.update(net, "logits", channels=3)
    one = Model().to(DEVICE)
    one.load_state_dict(net.state_dict() | {"scale.weight": net.scale.weight.detach().sum(1, keepdim=True)})
    other = make_updater(opt)
    other.update(one, "logits")
    assert int((updater.masks ^ other.masks).sum()) <= 1  # a logit within rounding of 0
    assert not torch.equal(updater.masks, updater.initial) and net.training


def fit(module: nn.Module, loader, epochs: int, on_train_epoch_end: Callable[[int], None]) -> list[Tensor]:
    """As Lightning trains: an iterator for checks, another for the epoch, one batch ahead, moved over, in bf16."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    seen = []
    for epoch in range(epochs):
        iter(loader)
        module.train()
        batches = iter(loader)
        following = next(batches, None)
        while following is not None:
            batch, following = following, next(batches, None)
            images, masks = (part.to(DEVICE) for part in batch)
            seen.append(images)
            with torch.autocast(DEVICE, torch.bfloat16):
                logits = module(images)
            loss = soft_iou_loss(logits.float(), masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert module.training
        on_train_epoch_end(epoch)
    return seen


def test_a_trainer_that_asks_for_two_iterators_an_epoch(opt: SimpleNamespace) -> None:
    updater, module = make_updater(opt), Model().to(DEVICE)
    loader = updater.loader(2, 32, seed=7)

    def on_train_epoch_end(epoch: int) -> None:
        if epoch == 1:
            updater.update(module, "logits")

    seen = fit(module, loader, 3, on_train_epoch_end)
    assert loader.epoch == 3 and len(seen) == 3 * len(loader)
    for epoch in range(3):
        steps = updater.loader(2, 32, seed=7).steps(epoch)
        for images, (wanted, _) in zip(seen[3 * epoch :], steps, strict=False):
            assert torch.equal(images, wanted)
    assert not torch.equal(updater.masks, updater.initial)


def test_a_checkpoint_goes_on_to_the_same_bits(opt: SimpleNamespace, tmp_path: Path) -> None:
    """Weights, optimizer, corrected masks and the loader's epoch; nothing else is needed, not even the random state."""

    def start() -> SimpleNamespace:
        net, updater = Model().to(DEVICE), make_updater(opt)
        net.drop.p = 0.0  # dropout draws from torch's random state, which is the trainer's own to save
        optimizer, loader = torch.optim.Adam(net.parameters(), lr=1e-2), updater.loader(2, 32, positive=0.5)
        return SimpleNamespace(net=net, updater=updater, optimizer=optimizer, loader=loader)

    def go_on(run: SimpleNamespace, *, correct: bool = True) -> None:
        train_epoch(run.net, run.loader, run.optimizer)
        if correct:
            run.updater.update(run.net, "logits")

    whole = start()
    go_on(whole)
    state = {name: getattr(whole, name).state_dict() for name in ("net", "optimizer", "updater")}
    torch.save(state | {"epoch": whole.loader.epoch}, tmp_path / "last.pth")
    corrected = whole.updater.masks.clone()
    assert not torch.equal(corrected, whole.updater.initial)

    torch.rand(7)
    later = start()
    state = torch.load(tmp_path / "last.pth", weights_only=True)
    for name in ("net", "optimizer", "updater"):
        getattr(later, name).load_state_dict(state[name])
    later.loader.epoch = state["epoch"]
    assert torch.equal(later.updater.masks, corrected)
    for run in (whole, later):
        go_on(run, correct=False)  # on the corrected masks
        go_on(run)
    assert later.loader.epoch == whole.loader.epoch == 3
    assert all(torch.equal(value, later.net.state_dict()[name]) for name, value in whole.net.state_dict().items())
    assert torch.equal(later.updater.masks, whole.updater.masks) and not torch.equal(later.updater.masks, corrected)
