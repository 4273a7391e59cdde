"""CIFAR-100 with its fine labels as TFDS prepares it."""

from fedrevive_jax.data.dataset import Dataset, DatasetSpec, Preprocessing
from fedrevive_jax.data.tfds_reader import image_dataset

SPEC = DatasetSpec((32, 32, 3), 100, 50_000, 10_000)
# The fine labels, in alphabetical order.
_FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CLASS_NAMES = tuple(_FINE.split())
PREPROCESSING = Preprocessing(
    crop_padding=4,
    flip=True,
    rotation=15.0,
    mean=(0.507, 0.487, 0.441),
    std=(0.268, 0.257, 0.276),
)


def load(data_dir: str, seed: int) -> Dataset:
    """Reads CIFAR-100; the official training images are split by `seed`."""
    return image_dataset("cifar100", SPEC, CLASS_NAMES, PREPROCESSING, data_dir, seed)
