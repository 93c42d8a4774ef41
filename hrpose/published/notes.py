"""Why a printed figure does not come out of the network it is printed for."""

TRUNCATED = "the printed figure is cut off, not rounded"
RESCALED = "the printed figure is 15.7, itself cut off, times the ratio of the image areas"
HOURGLASS = (
    "no placement of the residual module behind each hourglass gives both figures: behind it (as in the original code) "
    "costs 19.2, at its bottom 14.3, with 25.4 M parameters either way; without it 23.7 M and 14.3"
)
CPN = (
    "other readings than the default, of which the printed 6.2 comes out; with the heads that only training runs these "
    "cost 6.7 and 6.3"
)
RESNET = (
    "ResNet-50 is 0.3 %, ResNet-101 0.5 % below the printed 3.82 and 7.30, and its 44.549 M are printed as 44.6; "
    "ResNet-152 of the same table comes out"
)
HRNETV2_W40 = (
    "the plain network of width 40 has 45.9 M parameters and costs 535.4 (10^9) or 498.7 (2^30); the row's 45.2 M and "
    "493.2 are those of another network, while HRNetV2-W48 of the same table comes out within 0.03 %"
)
HRNETV2_W48 = "0.03 % above the printed figure"
