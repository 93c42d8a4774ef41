"""ResNet: "Deep Residual Learning for Image Recognition" (He et al., CVPR 2016), the trunk of SimpleBaseline and CPN,
and the classifier whose ImageNet weights start them. Module names are those of torchvision's checkpoints."""

from typing import Any

from torch import Tensor, nn

from hrpose.errors import check_choice, check_count
from hrpose.models.blocks import Bottleneck, check_images, initialise

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # depth: bottlenecks of layer1..4
CHANNELS = (256, 512, 1024, 2048)  # of C2..C5, the outputs of layer1..4


class ResNetTrunk(nn.Module):
    """7x7 convolution, max pooling, and four stages of bottlenecks; every stage after the first halves the resolution.

    Args:
        depth: 50, 101 or 152, the weighted layers of the classifier.
        stride_in: convolution of a stage's first bottleneck that has its stride: "3x3", as in torchvision, or "1x1", as
            in the authors' Caffe weights. State dicts have the same entries and shapes, but weights trained for one
            give wrong features in the other.
    Raises: InputError for a value outside these.
    """

    # For load_weights: what a checkpoint with another head shares with this network.
    trunk = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
    size_multiple = 32

    def __init__(self, depth: int, *, stride_in: str = "3x3"):
        super().__init__()
        self.where = type(self).__name__
        check_choice(depth, tuple(BLOCKS), self.where, "depth")
        check_choice(stride_in, ("3x3", "1x1"), self.where, "stride_in")
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        def stage(number: int) -> nn.Sequential:
            channels, blocks = CHANNELS[number - 1], BLOCKS[depth][number - 1]
            before, stride = (64, 1) if number == 1 else (CHANNELS[number - 2], 2)
            first = Bottleneck(before, channels // 4, channels, stride=stride, stride_in=stride_in)
            return nn.Sequential(first, *(Bottleneck(channels, channels // 4, channels) for _ in range(blocks - 1)))

        self.layer1 = stage(1)
        self.layer2 = stage(2)
        self.layer3 = stage(3)
        self.layer4 = stage(4)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W) -> C2..C5: (N, 256, H/4, W/4), (N, 512, H/8, W/8), (N, 1024, H/16, W/16),
        (N, 2048, H/32, W/32)."""
        check_images(images, self.size_multiple, self.where)
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


class ResNetClassifier(ResNetTrunk):
    """Trunk, global average and a linear layer. State-dict entries are those of torchvision's resnet50, 101, 152.

    Args:
        num_classes: logits per image.
    """

    def __init__(self, *, depth: int, num_classes: int = 1000):
        super().__init__(depth)
        check_count(num_classes, "ResNetClassifier", "num_classes")
        self.fc = nn.Linear(CHANNELS[-1], num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W), H and W multiples of 32; InputError for another shape."""
        return self.fc(self.features(images)[-1].mean((2, 3)))


def resnet50_cls(**options: Any) -> ResNetClassifier:
    return ResNetClassifier(depth=50, **options)


def resnet101_cls(**options: Any) -> ResNetClassifier:
    return ResNetClassifier(depth=101, **options)


def resnet152_cls(**options: Any) -> ResNetClassifier:
    return ResNetClassifier(depth=152, **options)
