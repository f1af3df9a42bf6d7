"""FCN of MoCo (arXiv 1911.05722): output stride 16, two 3x3 convolutions with dilation 6, no auxiliary head."""

_base_ = "./fcn_r50-d8.py"
model = dict(
    # The released recipes normalize pixel values in [0, 255] by the mean and standard deviation of values in [0, 1];
    # the inputs are about 255 times larger than usual, for which the first batch norm compensates.
    data_preprocessor=dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], size=(513, 513)),
    backbone=dict(dilations=(1, 1, 1, 2), strides=(1, 2, 2, 1)),
    decode_head=dict(channels=256, concat_input=False, dropout_ratio=0, dilation=6, align_corners=True),
    auxiliary_head=None,
)
