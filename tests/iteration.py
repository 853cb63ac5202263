"""The oracle of training: one iteration by the equations of Lan et al. 2023 (arXiv 2310.17874) in plain PyTorch.

P x P matrices, explicit formulas, a hand-written Adam and teacher. Nothing comes from smooseg_fast or
smooseg_kernels, so an error there cannot be repeated here. It learns one head, in float64, or in float32 to measure
what rounding costs. Also here: the random draws by the rule that resumed runs depend on, small images, and a backbone
for them ("iteration:features_of").
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

PATCH, GRID, D = 8, 3, 6
SIDE, P = PATCH * GRID, GRID * GRID


# images and their features


def make_images(count, seed=0):
    """uint8 [SIDE,SIDE,3] each; a patch has one colour, some patches are black, and an image has a tone of its own."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(1, 128, (count, GRID, GRID, 3)) + rng.integers(0, 128, (count, 1, 1, 3))
    colours[:, 1, 2] = 0
    return list(colours.repeat(PATCH, 1).repeat(PATCH, 2).astype(np.uint8))


def features_of(images):
    """[B,3,H,W] in 0..1 -> float16 [B,D,h,w]; exact for every batch size. A black patch has a row of zeros."""
    colours = (images[:, :, ::PATCH, ::PATCH] * 255).round().double()
    mixing = torch.tensor([[3, 1, -2], [1, -4, 2], [2, 3, 1], [-1, 2, 5], [4, -1, 1], [1, 1, 1]], device=images.device)
    waves = torch.einsum("dc,bchw->bdhw", mixing.double(), colours / 90).sin() + 0.4
    return (waves * (colours.sum(1, keepdim=True) > 0)).half()


def other_features_of(images):
    return 1 - features_of(images)


features_of.patch = other_features_of.patch = PATCH


def features_of_images(images):
    """float64 [N,P,D] of `make_images`, as a feature store rounds them."""
    pixels = torch.stack([torch.from_numpy(image) for image in images]).permute(0, 3, 1, 2).float() / 255
    return features_of(pixels).flatten(2).mT.double()


# settings


@dataclass(frozen=True)
class Recipe:
    """The settings of one head's learning. No default is near a run's, and no two are alike, so that a swap shows."""

    within: float = 0.31
    across: float = -0.12
    relative: bool = False
    temperature: float = 0.23
    dropout: float = 0.35
    teacher_decay: float = 0.8
    lr: float = 4e-3
    lr_prototypes: float = 1.7e-2
    batch_size: int = 3
    patches: int | None = None
    prototypes: int = 4
    code_dim: int = 5
    seed: int = 5
    data_seed: int = 11


# draws


def seed_of(data_seed, *key):
    """The data seed and a key: (1, epoch), (2,) of every step, (3, window, round) or (4, pass)."""
    for part in key:
        data_seed = (data_seed * 6364136223846793005 + part * 1442695040888963407 + 1) % 2**63
    return data_seed ^ (data_seed >> 29)


def generator(data_seed, *key):
    return torch.Generator().manual_seed(seed_of(data_seed, *key))


def draw_rows(step, N, recipe):
    """int64 [B]: the rows of one step in an epoch's permutation, whose short last batch is dropped."""
    B = recipe.batch_size
    epoch, place = divmod(step, N // B)
    return torch.randperm(N, generator=generator(recipe.data_seed, 1, epoch))[place * B : place * B + B]


def draw_streamed_rows(step, N, recipe, windows, window_steps):
    """int64 [B]: images of one step, where each pass over N images of one square is cut into windows."""
    number, place = divmod(step, window_steps)
    turn, window = divmod(number, windows)
    images = torch.randperm(N, generator=generator(recipe.data_seed, 4, turn))
    images = images[N * window // windows : N * (window + 1) // windows]
    places = []
    while len(places) < window_steps * recipe.batch_size:
        g = generator(recipe.data_seed, 3, number, len(places) // len(images))
        places += torch.randperm(len(images), generator=g).tolist()
    return images[torch.tensor(places)[place * recipe.batch_size : (place + 1) * recipe.batch_size]]


def random_words(step, recipe, count):
    """`count` whole numbers below 2^64 of a step, by SplitMix64: a counter whose numbers are mixed."""

    def mixed(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    golden, seed = 0x9E3779B97F4A7C15, seed_of(recipe.data_seed, 2)
    begin = mixed((seed + (step + 1) * golden) % 2**64)
    return [mixed((begin + number * golden) % 2**64) for number in range(1, count + 1)]


def pieces(words, bits):
    """The words cut into numbers of so many bits, the lowest first, as signed numbers."""
    parts = [word >> shift & (2**bits - 1) for word in words for shift in range(0, 64, bits)]
    return [part - 2**bits if part >> (bits - 1) else part for part in parts]


def shuffled(B, words):
    """[B]: the permutation that partners come from, by the order of the first B words."""
    return sorted(range(B), key=pieces(words[:B], 64).__getitem__)


def draw_rest(step, recipe, patches=P, channels=D):
    """(partner [B], masks [3,B,D] or None, patches [B,n] or None) of one step; its words serve them in this order."""
    B, n = recipe.batch_size, recipe.patches
    in_masks = math.ceil(3 * B * channels / 4) if recipe.dropout > 0 else 0
    in_keys = math.ceil(B * patches / 2) if n is not None and n < patches else 0
    words = random_words(step, recipe, B + in_masks + in_keys)
    partner = torch.tensor([(n + 1) % B if drawn == n else drawn for n, drawn in enumerate(shuffled(B, words))])
    masks = chosen = None
    if in_masks:
        numbers = torch.tensor(pieces(words[B : B + in_masks], 16)[: 3 * B * channels]).view(3, B, channels)
        masks = (numbers + 2**15 >= round(recipe.dropout * 2**16)).float() / (1 - recipe.dropout)
    if in_keys:
        keys, unit = pieces(words[B + in_masks :], 32), 2 ** math.ceil(math.log2(patches))
        images = [keys[first : first + patches] for first in range(0, B * patches, patches)]
        keyed = [sorted((key // unit, number) for number, key in enumerate(image)) for image in images]
        chosen = torch.tensor([sorted(number for _, number in image[:n]) for image in keyed])
    return partner, masks, chosen


# the iteration

WEIGHTS = [f"projection.{layer}.{kind}" for layer in ("linear", "hidden", "outer") for kind in ("weight", "bias")]


def start(recipe, dim=D):
    """A head's tensors: PyTorch's default layers, Xavier-normal prototypes of length 1, teacher = student. float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        shapes = (("linear", recipe.code_dim), ("hidden", dim), ("outer", recipe.code_dim))
        layers = {name: torch.nn.Linear(dim, out) for name, out in shapes}
        rows = torch.nn.init.xavier_normal_(torch.empty(recipe.prototypes, recipe.code_dim))
    head = {f"projection.{name}.{kind}": getattr(layers[name], kind) for name in layers for kind in ("weight", "bias")}
    head["student"] = head["teacher"] = rows / rows.norm(dim=1, keepdim=True)
    return {name: value.detach().double().clone() for name, value in head.items()}


def unit(rows):
    """Rows of length 1, or 0 where they are shorter than 1e-10."""
    norms = rows.norm(dim=-1, keepdim=True)
    return torch.where(norms < 1e-10, torch.zeros_like(rows), rows / norms.clamp(min=1e-10))


def codes_of(head, f, linear_mask=None, hidden_mask=None):
    """z = W1 (f m1) + b1 + W3 SiLU(W2 (f m2) + b2) + b3 of features [B,P,D] and masks [B,D]."""
    f1, f2 = (f if mask is None else f * mask[:, None] for mask in (linear_mask, hidden_mask))
    w1, b1, w2, b2, w3, b3 = (head[name] for name in WEIGHTS)
    x = f2 @ w2.T + b2
    return f1 @ w1.T + b1 + (x * torch.sigmoid(x)) @ w3.T + b3


def energy_of(f, p, partner, threshold, relative):
    """(energy, label distance, mean closeness) of the pairs of each image with its partner."""
    u, c = unit(f), unit(p)
    S, distance = u @ u[partner].mT, 1 - c @ c[partner].mT
    W = S - S.mean(2, keepdim=True) + S.mean()
    b = threshold + S.mean() if relative else threshold
    return ((W - b) * distance).mean(), distance.mean(), S.mean()


def objective(head, f, partner, masks, recipe):
    """The losses of one batch [B,P,D] as scalars by the names that metrics have."""
    m0, m1, m2 = (None, None, None) if masks is None else masks.to(f.dtype)
    z = codes_of(head, f, m1, m2)
    to_teacher = unit(z) @ unit(head["teacher"]).T
    scores = (to_teacher / recipe.temperature).exp()
    p = scores / scores.sum(-1, keepdim=True)
    closeness_features = f if m0 is None else f * m0[:, None]
    itself = torch.arange(len(f))
    within = energy_of(closeness_features, p, itself, recipe.within, recipe.relative)
    across = energy_of(closeness_features, p, partner, recipe.across, recipe.relative)
    logits = unit(z.detach()) @ unit(head["student"]).T
    chosen = logits.gather(-1, to_teacher.argmax(-1, keepdim=True))[..., 0]
    data = (logits.exp().sum(-1).log() - chosen).mean()
    names = ("energy", "distance", "closeness")
    figures = {f"{name}_within": value for name, value in zip(names, within)}
    figures |= {f"{name}_across": value for name, value in zip(names, across)}
    return {"total": within[0] + across[0] + data, "data": data, **figures}


class Learner:
    """One head that learns: its tensors and what Adam remembers of them."""

    def __init__(self, recipe, dtype=torch.float64, dim=D):
        self.recipe, self.head = recipe, {name: value.to(dtype) for name, value in start(recipe, dim).items()}
        self.learnt = [*WEIGHTS, "student"]
        self.moments = {name: (torch.zeros_like(self.head[name]),) * 2 for name in self.learnt}
        self.count = 0

    def step(self, features, partner, masks=None, patches=None):
        """One iteration on features [B,P,D] -> its losses: losses, teacher from the student before its update, Adam."""
        recipe, head = self.recipe, self.head
        f = features.to(head["student"].dtype)
        if patches is not None:
            f = torch.stack([image[chosen] for image, chosen in zip(f, patches)])
        leaves = {name: value.clone().requires_grad_(name != "teacher") for name, value in head.items()}
        losses = objective(leaves, f, partner, masks, recipe)
        gradients = torch.autograd.grad(losses["total"], [leaves[name] for name in self.learnt])
        a = recipe.teacher_decay
        after = {"teacher": a * head["teacher"] + (1 - a) * head["student"]}
        self.count += 1
        for name, g in zip(self.learnt, gradients):
            m, v = self.moments[name]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            self.moments[name] = m, v
            rate = recipe.lr_prototypes if name == "student" else recipe.lr
            mean, square = m / (1 - 0.9**self.count), v / (1 - 0.999**self.count)
            after[name] = head[name] - rate * mean / (square.sqrt() + 1e-8)
        self.head = after
        return {name: float(value.detach()) for name, value in losses.items()}


def learn(recipe, features, steps, rows_of=draw_rows, dtype=torch.float64, **stream):
    """Iterations numbered as in `steps` on features [N,P,D] -> (the learner, the losses and the head of each)."""
    learner, losses, heads = Learner(recipe, dtype, features.shape[2]), [], []
    for step in steps:
        rows = rows_of(step, len(features), recipe, **stream)
        losses.append(learner.step(features[rows], *draw_rest(step, recipe, *features.shape[1:])))
        heads.append(dict(learner.head))
    return learner, losses, heads


# figures of what was learnt


def labels_of(head, features, prototypes="teacher"):
    """int64 [N,P]."""
    return (unit(codes_of(head, features)) @ unit(head[prototypes]).T).argmax(-1)


def entropy(shares):
    """In nats."""
    return -sum(share * math.log(share) for share in shares.tolist() if share > 0)


def figures_of(head, features):
    """The label-free figures of a head on all features [N,P,D], by sums over pairs of patches."""
    labels, K = labels_of(head, features), len(head["teacher"])
    member = F.one_hot(labels, K).double()
    inside, shares = [entropy(image) for image in member.mean(1)], member.mean((0, 1))
    f, same = unit(features).flatten(0, 1), labels.flatten()[:, None] == labels.flatten()
    weight = (f @ f.T).fill_diagonal_(0)
    degree, twice_m = weight.sum(1), weight.sum()
    modularity = float((same * (weight - degree[:, None] * degree / twice_m)).sum() / twice_m)
    group_means = torch.stack([f[labels.flatten() == label].mean(0) for label in labels.flatten()])
    explained = float((group_means - f.mean(0)).square().sum() / (f - f.mean(0)).square().sum())
    return {
        "largest_share": float(shares.max()),
        "perplexity": math.exp(entropy(shares)),
        "labels_per_image": sum(map(math.exp, inside)) / len(inside),
        "image_information": 1 - sum(inside) / len(inside) / entropy(shares),
        "agreement": float((labels == labels_of(head, features, "student")).double().mean()),
        "modularity": modularity,
        "explained_variance": explained,
        "modularity_x_explained": modularity * explained,
    }
