"""The networks of the parity tests as others have them.

From torchvision, timm, pretrainedmodels and facenet-pytorch where those have the network. Network in Network and the papers'
own forms of GoogLeNet (as in Caffe's bvlc_googlenet) and Inception-ResNet v2 have no such source; they are written here,
from the definitions, tables and figures.
"""

import importlib.util
import warnings
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

warnings.filterwarnings("ignore")


def googlenet(classes):
    return torchvision.models.GoogLeNet(classes, aux_logits=True, init_weights=False, dropout=0.0, dropout_aux=0.0)


def inception_v3(classes):
    return torchvision.models.Inception3(classes, aux_logits=True, init_weights=False, dropout=0.0)


def inception_v4(classes):
    return timm.create_model("inception_v4", num_classes=classes, drop_rate=0.0)


def inception_resnet_v2(classes):
    return timm.create_model("inception_resnet_v2", num_classes=classes, drop_rate=0.0)


def module_of(package, path):
    """One file of a package, without the package's own __init__, which needs more than that file."""
    file = Path(distribution(package).locate_file(path))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bn_inception(classes):
    network = module_of("pretrainedmodels", "pretrainedmodels/models/bninception.py").BNInception(classes)
    network.global_pool = nn.AdaptiveAvgPool2d(1)  # instead of 7 x 7, which is the same for its own images
    return network


def inception_resnet_v1(classes):
    """facenet-pytorch's network without its last block and its bottleneck."""
    from facenet_pytorch.models.inception_resnet_v1 import InceptionResnetV1

    class Paper(InceptionResnetV1):
        def __init__(self):
            super().__init__(classify=True, num_classes=classes, dropout_prob=0.0)
            del self.block8, self.last_linear, self.last_bn
            self.logits = nn.Linear(1792, classes)

        def forward(self, x):
            for part in ("conv2d_1a", "conv2d_2a", "conv2d_2b", "maxpool_3a", "conv2d_3b", "conv2d_4a", "conv2d_4b",
                         "repeat_1", "mixed_6a", "repeat_2", "mixed_7a", "repeat_3"):
                x = getattr(self, part)(x)
            return self.logits(x.mean(dim=(2, 3)))

    return Paper()


class Nin(nn.Module):
    """cuda-convnet's NIN/cifar-10_def, with a ReLU behind the last layer too."""

    def __init__(self, classes):
        super().__init__()
        blocks = [(3, 5, (192, 160, 96)), (96, 5, (192, 192, 192)), (192, 3, (192, 192, classes))]
        for b, (inputs, kernel, (one, two, three)) in enumerate(blocks, 1):
            self.add_module(f"conv{b}", nn.Conv2d(inputs, one, kernel, padding=kernel // 2))
            self.add_module(f"cccp{2 * b - 1}", nn.Conv2d(one, two, 1))
            self.add_module(f"cccp{2 * b}", nn.Conv2d(two, three, 1))

    def forward(self, x):
        for b in 1, 2, 3:
            if b > 1:
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            for name in f"conv{b}", f"cccp{2 * b - 1}", f"cccp{2 * b}":
                x = F.relu(self.get_submodule(name)(x))
        return x.mean(dim=(2, 3))


class GoogLeNetPaper(nn.Module):
    """bvlc_googlenet: the layers by their names in Caffe's file."""

    BLOCKS = {
        "3a": (64, 96, 128, 16, 32, 32), "3b": (128, 128, 192, 32, 96, 64), "4a": (192, 96, 208, 16, 48, 64),
        "4b": (160, 112, 224, 24, 64, 64), "4c": (128, 128, 256, 24, 64, 64), "4d": (112, 144, 288, 32, 64, 64),
        "4e": (256, 160, 320, 32, 128, 128), "5a": (256, 160, 320, 32, 128, 128),
        "5b": (384, 192, 384, 48, 128, 128),
    }

    def __init__(self, classes):
        super().__init__()
        self.add_module("conv1/7x7_s2", nn.Conv2d(3, 64, 7, 2, 3))
        self.add_module("conv2/3x3_reduce", nn.Conv2d(64, 64, 1))
        self.add_module("conv2/3x3", nn.Conv2d(64, 192, 3, padding=1))
        inputs = 192
        for name, (one, three_reduce, three, five_reduce, five, pool) in self.BLOCKS.items():
            block = f"inception_{name}/"
            self.add_module(block + "1x1", nn.Conv2d(inputs, one, 1))
            self.add_module(block + "3x3_reduce", nn.Conv2d(inputs, three_reduce, 1))
            self.add_module(block + "3x3", nn.Conv2d(three_reduce, three, 3, padding=1))
            self.add_module(block + "5x5_reduce", nn.Conv2d(inputs, five_reduce, 1))
            self.add_module(block + "5x5", nn.Conv2d(five_reduce, five, 5, padding=2))
            self.add_module(block + "pool_proj", nn.Conv2d(inputs, pool, 1))
            inputs = one + three + five + pool
        for head, channels in ("loss1", 512), ("loss2", 528):
            self.add_module(head + "/conv", nn.Conv2d(channels, 128, 1))
            self.add_module(head + "/fc", nn.Linear(2048, 1024))
            self.add_module(head + "/classifier", nn.Linear(1024, classes))
        self.add_module("loss3/classifier", nn.Linear(1024, classes))
        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)

    def unit(self, name, x):
        return F.relu(self.get_submodule(name)(x))

    def block(self, name, x):
        def path(x, *names):
            for part in names:
                x = self.unit(f"inception_{name}/{part}", x)
            return x

        pooled = F.max_pool2d(x, 3, 1, 1)
        return torch.cat([path(x, "1x1"), path(x, "3x3_reduce", "3x3"), path(x, "5x5_reduce", "5x5"),
                          path(pooled, "pool_proj")], 1)

    def head(self, name, x):
        x = self.unit(name + "/conv", F.avg_pool2d(x, 5, 3))
        return self.get_submodule(name + "/classifier")(self.unit(name + "/fc", x.flatten(1)))

    def forward(self, x):
        x = self.norm(F.max_pool2d(self.unit("conv1/7x7_s2", x), 3, 2, ceil_mode=True))
        x = self.norm(self.unit("conv2/3x3", self.unit("conv2/3x3_reduce", x)))
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        heads = {}
        for name in self.BLOCKS:
            x = self.block(name, x)
            if name in ("4a", "4d") and self.training:
                head = "loss1" if name == "4a" else "loss2"
                heads[head] = self.head(head, x)
            if name in ("3b", "4e"):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        return self.get_submodule("loss3/classifier")(x.mean(dim=(2, 3))), heads


class InceptionResnetV2Paper(nn.Module):
    """Figures 3, 7 and 16 to 19 of the paper, with 1152 and 2144 channels where it says 1154 and 2048."""

    class Residual(nn.Module):
        def __init__(self, unit, channels, paths, scale):
            super().__init__()
            self.scale, total = scale, 0
            for b, path in enumerate(paths):
                units, inputs = [], channels
                for outputs, kernel in path:
                    units.append(unit(inputs, outputs, kernel, padding=tuple(k // 2 for k in kernel)))
                    inputs = outputs
                self.add_module(f"branch{b}", nn.Sequential(*units) if len(units) > 1 else units[0])
                total += inputs
            self.count, self.conv2d = len(paths), nn.Conv2d(total, channels, 1)

        def forward(self, x):
            y = torch.cat([self.get_submodule(f"branch{b}")(x) for b in range(self.count)], 1)
            return F.relu(self.conv2d(y) * self.scale + x)

    class Reduction(nn.Module):
        def __init__(self, unit, channels, paths):
            super().__init__()
            for b, path in enumerate(paths):
                units, inputs = [], channels
                for outputs, size in path[:-1]:
                    units.append(unit(inputs, outputs, size, padding=size // 2))
                    inputs = outputs
                units.append(unit(inputs, path[-1], 3, stride=2))
                self.add_module(f"branch{b}", nn.Sequential(*units) if len(units) > 1 else units[0])
            self.count = len(paths)

        def forward(self, x):
            branches = [self.get_submodule(f"branch{b}")(x) for b in range(self.count)]
            return torch.cat([*branches, F.max_pool2d(x, 3, 2)], 1)

    def __init__(self, classes):
        from timm.models.inception_v4 import ConvNormAct, Mixed3a, Mixed4a, Mixed5a

        def unit(*args, padding=0, **kwargs):
            return ConvNormAct(*args, padding=padding, norm_kwargs={"eps": 1e-3}, **kwargs)

        super().__init__()
        self.stem = nn.Sequential(unit(3, 32, 3, stride=2), unit(32, 32, 3), unit(32, 64, 3, padding=1),
                                  Mixed3a(unit), Mixed4a(unit), Mixed5a(unit))
        one, wide, high = (1, 1), (1, 7), (7, 1)
        a = [[(32, one)], [(32, one), (32, (3, 3))], [(32, one), (48, (3, 3)), (64, (3, 3))]]
        b = [[(192, one)], [(128, one), (160, wide), (192, high)]]
        c = [[(192, one)], [(192, one), (224, (1, 3)), (256, (3, 1))]]
        self.repeat = nn.Sequential(*[self.Residual(unit, 384, a, 0.17) for _ in range(5)])
        self.mixed_6a = self.Reduction(unit, 384, [[384], [(256, 1), (256, 3), 384]])
        self.repeat_1 = nn.Sequential(*[self.Residual(unit, 1152, b, 0.10) for _ in range(10)])
        self.mixed_7a = self.Reduction(unit, 1152, [[(256, 1), 384], [(256, 1), 288], [(256, 1), (288, 3), 320]])
        self.repeat_2 = nn.Sequential(*[self.Residual(unit, 2144, c, 0.20) for _ in range(5)])
        self.classif = nn.Linear(2144, classes)

    def forward(self, x):
        for part in (self.stem, self.repeat, self.mixed_6a, self.repeat_1, self.mixed_7a, self.repeat_2):
            x = part(x)
        return self.classif(x.mean(dim=(2, 3)))


@dataclass
class Case:
    """One network: how Lockstep calls it, how to make the other's, and the images to compare on."""

    model: str
    make: callable
    batch: int
    side: int
    options: dict = field(default_factory=dict)
    batch_norm: str = "sync"
    aux_weight: float = 0.0

    def outputs(self, network, images):
        """The main output, and the auxiliary ones by Lockstep's names."""
        out = network(images)
        if isinstance(out, torchvision.models.GoogLeNetOutputs):
            return out.logits, {"aux1": out.aux_logits1, "aux2": out.aux_logits2}
        if isinstance(out, torchvision.models.inception.InceptionOutputs):
            return out.logits, {"AuxLogits": out.aux_logits}
        return out if isinstance(out, tuple) else (out, {})

    def loss(self, logits, heads, labels):
        return F.cross_entropy(logits, labels) + sum(
            self.aux_weight * F.cross_entropy(head, labels) for head in heads.values())


NO_DROPOUT = {"dropout": 0.0}
NO_DROPOUTS = {"dropout": 0.0, "aux_dropout": 0.0}

# 299 is the least side for the head of Inception v3, and 224 gives Caffe's heads the map that they are made for. At 107
# the last map is 2 x 2: a batch norm over fewer values loses too many digits to compare them.
CASES = {
    "nin": Case("nin", Nin, 4, 32, NO_DROPOUT, "none"),
    "googlenet": Case("googlenet", googlenet, 4, 64, NO_DROPOUTS, aux_weight=0.3),
    "googlenet-paper": Case("googlenet", GoogLeNetPaper, 2, 224, NO_DROPOUTS | {"variant": "paper"}, "none", 0.3),
    "bn-inception": Case("bn-inception", bn_inception, 4, 64, NO_DROPOUT),
    "inception-v3": Case("inception-v3", inception_v3, 2, 299, NO_DROPOUT, aux_weight=0.4),
    "inception-v4": Case("inception-v4", inception_v4, 3, 107, NO_DROPOUT),
    "inception-resnet-v1": Case("inception-resnet-v1", inception_resnet_v1, 2, 107, NO_DROPOUT),
    "inception-resnet-v2": Case("inception-resnet-v2", inception_resnet_v2, 2, 107, NO_DROPOUT),
    "inception-resnet-v2-paper": Case("inception-resnet-v2", InceptionResnetV2Paper, 2, 107,
                                      NO_DROPOUT | {"variant": "paper"}),
}
