"""20 Newsgroups, split by date, as the project's own TFDS builder prepares it."""

from fedrevive_jax.data.dataset import official_splits
from fedrevive_jax.data.texts import Texts, TextSpec
from fedrevive_jax.data.tfds_reader import find, read_texts

CLASS_NAMES = (
    "alt.atheism",
    "comp.graphics",
    "comp.os.ms-windows.misc",
    "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware",
    "comp.windows.x",
    "misc.forsale",
    "rec.autos",
    "rec.motorcycles",
    "rec.sport.baseball",
    "rec.sport.hockey",
    "sci.crypt",
    "sci.electronics",
    "sci.med",
    "sci.space",
    "soc.religion.christian",
    "talk.politics.guns",
    "talk.politics.mideast",
    "talk.politics.misc",
    "talk.religion.misc",
)
SPEC = TextSpec(len(CLASS_NAMES), 11_314, 7_532)


def load(data_dir: str, seed: int) -> Texts:
    """Reads the posts; the official training posts are split by `seed`.

    A post of which nothing is left without headers, footers and quotes is an empty text.
    """
    stored = read_texts(find("newsgroups", data_dir), ("train", "test"), SPEC.num_classes)
    training, testing = stored.sizes
    splits = official_splits(training, testing, seed)
    return Texts("newsgroups", CLASS_NAMES, stored.samples, stored.labels, splits)
