"""Small modules and their exported files, shared by the tests of this folder."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.export import to_onnx
from vitrail.ops import region_route, routed_attention, window_attention

from ..translations import remember_translations

remember_translations()


class Attentive(nn.Module):
    """A convolution, LayerNorm, attention, GELU and a classifier: what vision transformers are made of."""

    num_classes = 10

    def __init__(self, width=16, in_chans=3):
        super().__init__()
        self.stem = nn.Conv2d(in_chans, width, 8, 8)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.act = nn.GELU()
        self.head = nn.Linear(width, self.num_classes)

    def forward_tokens(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x))[:, None].chunk(3, -1)
        return self.act(x + F.scaled_dot_product_attention(q, k, v)[:, 0])

    def forward(self, x):
        return self.head(self.forward_tokens(x).mean(1))


class Pyramid(Attentive):
    """`Attentive` with timm's way to ask for feature maps."""

    def forward_intermediates(self, x, intermediates_only=False, output_fmt="NCHW"):
        assert intermediates_only
        assert output_fmt == "NCHW"
        x = self.stem(x)
        return [x, F.max_pool2d(F.gelu(x), 2)]


class Headed(Attentive):
    """`Attentive` with timm's way to ask for what the classifier reads."""

    def forward_features(self, x):
        return self.forward_tokens(x)

    def forward_head(self, x, pre_logits=False):
        return x.mean(1) if pre_logits else self.head(x.mean(1))


class Routed(nn.Module):
    """Routed attention over a grid of 4 x 4 regions."""

    num_classes = 10

    def __init__(self, topk, width=16):
        super().__init__()
        self.topk = topk
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, self.num_classes)

    def forward(self, x):
        q, k, v = self.qkv(self.stem(x).permute(0, 2, 3, 1)).chunk(3, -1)
        size = (-(-q.shape[1] // 4), -(-q.shape[2] // 4))
        x = routed_attention(q, k, v, region_route(q, k, self.topk, size), size, num_heads=2)
        return self.head(x.mean((1, 2)))


class Windowed(nn.Module):
    """Window attention on a map that windows need not divide; what lies past it has a key and a value."""

    def __init__(self, shift=None, width=16):
        super().__init__()
        self.shift = shift
        self.stem = nn.Conv2d(3, width, 7, 4, 3)
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        q, k, v = self.qkv(x).chunk(3, -1)
        _, pad_key, pad_value = self.qkv.bias.chunk(3)
        return x + window_attention(
            q, k, v, [7, 7], 2, shift=self.shift, pad_key=pad_key, pad_value=pad_value
        )


class WindowReverse(nn.Module):
    """The published way to undo a partition into windows, whose batch size goes through a float."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x):
        x = self.stem(x)
        b, c, h, w = x.shape
        windows = x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 4, c).softmax(1)
        b = int(windows.shape[0] / (h * w / 4 / 4))
        return windows.view(b, h // 4, w // 4, 4, 4, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x):
        return self.stem(x).reshape(2, -1)


@pytest.fixture
def make():
    """`make("Routed", topk=1)`: one of the modules above with seeded weights."""
    modules = (Attentive, Pyramid, Headed, Routed, Windowed, WindowReverse, FixedBatch)
    classes = {cls.__name__: cls for cls in modules}

    def build(name, **kwargs):
        torch.manual_seed(0)
        return classes[name](**kwargs).eval()

    return build


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """An `Attentive` with the file and the report of its default export at 32 x 32."""
    torch.manual_seed(0)
    model = Attentive().eval()
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    return model, path, to_onnx(model, path, img_size=32)
