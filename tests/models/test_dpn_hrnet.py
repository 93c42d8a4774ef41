"""DPN2_hrnet: its numbers, and that it is HRNet, the down-sampling unit, two modules and DPN's tail."""

import pytest
import torch
import torch.nn.functional as F

from hrpose.cost import count_cost
from hrpose.errors import InputError
from hrpose.models import create_model
from hrpose.models.dpn import dilations


def test_counts():
    with torch.device("meta"):
        cost = count_cost(create_model("dpn2_hrnet_w32"), (192, 256))
    assert (round(cost.params / 1e6, 3), round(cost.gmacs(), 3)) == (29.525, 7.828)
    # HRNet-W32 without its head, 3x3 32 -> 256, two modules, 1x1 256 -> 256, head; two values per batch norm channel
    assert cost.params == 28_536_113 - 561 + (9 * 32 * 256 + 512) + 2 * 422_400 + (256 * 256 + 512) + 256 * 17 + 17


def test_tail_is_the_stated_sequence():
    torch.manual_seed(0)
    model = create_model("dpn2_hrnet_w32", 5).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.nn.init.normal_(model.heatmap.weight)
        high = model.features(images)[0]
        x = F.relu(F.conv2d(high, model.reduce[0].weight, stride=2, padding=1) / (1 + 1e-5) ** 0.5)
        assert x.shape == (1, 256, 8, 12)
        for module in model.dpm:
            x = module(x)
        x = F.conv2d(x, model.upsample[0].weight) / (1 + 1e-5) ** 0.5
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        want = F.conv2d(x, model.heatmap.weight, model.heatmap.bias)
        torch.testing.assert_close(model(images), want, atol=1e-4, rtol=1e-4)
    found = [block.conv2.dilation[0] for module in model.dpm for block in module]
    assert found == list(dilations("pyramid") * 2)


def test_wrong_options():
    with pytest.raises(InputError, match="interpolation must be 'bilinear' or 'nearest', got 'area'"):
        create_model("dpn2_hrnet_w32", interpolation="area")
    with pytest.raises(InputError, match="dilation must be"):
        create_model("dpn2_hrnet_w32", dilation="none")
