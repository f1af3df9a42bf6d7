"""The released recipe for Cityscapes with the usual normalization instead of the released one."""

_base_ = "./fcn_d6_r50-d16_769x769_90k_cityscapes_moco.py"
model = dict(data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]))
