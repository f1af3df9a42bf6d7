"""The views that `data.views` and `data.color` make, by torchvision's transforms of Pillow images."""

import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from data.views import ViewRecipe
from utils.batch import MEAN, STD


def pillow_transforms(recipe: ViewRecipe) -> transforms.Compose:
    """An image -> one view (3, S, S), normalized."""
    color = recipe.color
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(recipe.size, recipe.scale, recipe.ratio, transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(recipe.flip_p),
            transforms.RandomApply([transforms.ColorJitter(*color.jitter)], color.jitter_p),
            transforms.RandomGrayscale(color.gray_p),
            transforms.RandomApply([_Blur(color.blur_sigma)], color.blur_p),
            transforms.RandomSolarize(128, color.solarize_p),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class _Blur(torch.nn.Module):
    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, image: Image.Image) -> Image.Image:
        sigma = torch.empty(1).uniform_(*self.sigma).item()
        return image.filter(ImageFilter.GaussianBlur(sigma))
