"""FCN of MoCo (arXiv 1911.05722): output stride 16, two 3x3 convolutions with dilation 6, no auxiliary head."""

_base_ = "./fcn_r50-d8.py"
model = dict(
    # The released recipes normalize levels of 0 to 255 by the mean and deviation of levels of 0 to 1. The inputs are
    # therefore some 255 times larger than usual, which the first batch norm, being trained, absorbs.
    data_preprocessor=dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], size=(513, 513)),
    backbone=dict(dilations=(1, 1, 1, 2), strides=(1, 2, 2, 1)),
    decode_head=dict(channels=256, concat_input=False, dropout_ratio=0, dilation=6, align_corners=True),
    auxiliary_head=None,
)
