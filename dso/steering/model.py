"""Steering: the operators of a model's sites, attached as forward hooks and turned by one scale.

    steering = Steering.from_pretrained("runs/hiring/steering")
    with steering.on(model, scale=0.4):  # the operators follow the model to its device
        model.generate(**inputs)
    handle = steering.attach(model)
    handle.scale = 0.8            # live; a tensor of shape (batch,) steers each row by itself
    handle.detach()

Scale 0 is the base model bit for bit: the hook returns its input. A key-value cache that was begun at one scale cannot
be gone on with at another: that raises SteeringError, and a new cache is the way on.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn

from dso.errors import UserError
from dso.steering.checkpoint import FILES, read_checkpoint, write_checkpoint
from dso.steering.config import SteeringConfig, SteeringError
from dso.steering.fingerprint import fingerprint, require_same
from dso.steering.handle import Handle, attached
from dso.steering.hosts import named_sites, plain_name, unwrapped
from dso.steering.hub import upload
from dso.steering.operators import SteeringOperator, make_operator
from dso.steering.sites import resolve_sites, site_width


class Steering(nn.Module):
    """The operators of all sites.

    Args:
        config: sites with their widths, the operator kind, and what a checkpoint states besides.

    Attributes:
        card: the model card that is saved with it, Markdown.
    """

    def __init__(self, config: SteeringConfig):
        super().__init__()
        self.config = config
        self.card = ""
        self.key = secrets.token_hex(8)  # by which a key-value cache remembers what it was begun with
        self._names = tuple(config.sites)
        self._operators = nn.ModuleList(
            make_operator(config.operator, width, config.rank) for width in config.sites.values()
        )

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        operator: str = "affine",
        rank: int | None = None,
        sites: Sequence[str] | None = None,
        **facts: Any,
    ) -> Steering:
        """A fresh steering (the identity) for a model; ``facts`` are further fields of :class:`SteeringConfig`."""
        widths = {plain_name(name): width for name, width in resolve_sites(unwrapped(model), sites).items()}
        config = SteeringConfig(
            operator=operator, rank=rank, sites=widths, fingerprint=fingerprint(model, widths), **facts
        )
        return cls(config)

    @property
    def operators(self) -> dict[str, SteeringOperator]:
        """The operators by site name."""
        return dict(zip(self._names, cast(Iterable[SteeringOperator], self._operators), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """Every coefficient under its key in the checkpoint, ``<site>.<a|b|u|v>``; the tensors themselves."""
        return {f"{site}.{key}": value for site, op in self.operators.items() for key, value in op.named_parameters()}

    def scaled_tensors(self, scale: float) -> dict[str, Tensor]:
        """What :meth:`tensors` of the steering would be that does at scale 1 what this one does at ``scale``."""
        scaled = {site: operator.scaled(scale) for site, operator in self.operators.items()}
        return {f"{site}.{key}": value for site, own in scaled.items() for key, value in own.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy coefficients from a mapping with exactly the keys and shapes of :meth:`tensors`.

        Raises:
            SteeringError: naming the first key that is missing, unknown or of another shape.
        """
        own = self.tensors()
        if different := sorted(set(own) ^ set(tensors)):
            where = "missing from" if different[0] in own else "unknown in"
            raise SteeringError(f"{different[0]!r} is {where} the steering's tensors ({len(different)} such keys)")
        for key, value in own.items():
            if tensors[key].shape != value.shape:
                raise SteeringError(f"{key!r} has shape {tuple(tensors[key].shape)}, expected {tuple(value.shape)}")
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(tensors[key])

    def attach(self, model: nn.Module, scale: float | Tensor | None = None, *, check: bool = True) -> Handle:
        """Steer a model until the handle is detached.

        A model may be compiled or wrapped already; what was compiled before is compiled anew. Several steerings may be
        on a model, and act in the order in which they were attached.

        Args:
            scale: a number, or one a row; the default of the steering (``config.default_scale``) when None.
            check: refuse a model of other weights than the ones that the steering was trained on.

        Raises:
            SteeringError: if this steering is on the model already, or the model lacks a site, has another width there,
                or other weights; the model is left as it was.
        """
        if any(handle.steering is self for handle in attached(model)):
            raise SteeringError(
                "this steering is on the model already; set the scale of its handle (dso.attached(model)), or take it "
                "off first (handle.detach(), dso.detach_all(model))"
            )
        modules = self._modules_of(model)
        if check:
            require_same(self.config.fingerprint, model, self.config.sites, self._made_for)
        return Handle(self, model, modules, self.config.default_scale if scale is None else scale)

    @contextmanager
    def on(self, model: nn.Module, scale: float | Tensor | None = None, *, check: bool = True) -> Iterator[Handle]:
        """Steer a model within a block, as :meth:`attach` does; it is restored at the end, also on an error."""
        handle = self.attach(model, scale, check=check)
        try:
            yield handle
        finally:
            handle.detach()

    @property
    def _made_for(self) -> str:
        return f"the steering was made for {self.config.base_model or 'another model'}"

    def _modules_of(self, model: nn.Module) -> dict[str, nn.Module]:
        modules = named_sites(model)
        for site, width in self.config.sites.items():
            if site not in modules:
                raise SteeringError(f"the model has no module {site!r}; {self._made_for}")
            found = site_width(modules[site])
            if found not in (width, 0):
                raise SteeringError(f"module {site!r} has width {found}, expected {width}; {self._made_for}")
        return {site: modules[site] for site in self.config.sites}

    def save_pretrained(self, folder: str | Path, card: str | None = None) -> None:
        """Write ``dso_config.json``, ``dso_model.safetensors`` and ``README.md`` into a folder.

        Other files in it stay. See :func:`dso.steering.checkpoint.write_checkpoint` for what a kill leaves.

        Args:
            card: the model card; :attr:`card`, the one it was loaded with, by default.
        """
        write_checkpoint(folder, self.config, self.tensors(), self.card if card is None else card)

    def push_to_hub(
        self, name: str, *, card: str | None = None, private: bool | None = None, revision: str | None = None
    ) -> str:
        """Upload the steering with its model card to the Hub, and give its address.

        Args:
            name: ``owner/name``; the repository is made if it is not there.
            card: see :meth:`save_pretrained`.
            private: visibility of a new repository; the Hub's default for the owner when None.
            revision: the branch; it is made if it is not there.

        Raises:
            SteeringError: if there is no card, or the Hub is not reached, or refuses.
        """
        if not (self.card if card is None else card).strip():
            raise SteeringError(
                f"{name}: a steering is published with a card that says what was measured; give one "
                "(card=dso.evaluation.card.model_card(...)), or push what `dso train` saved"
            )
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, card)
            return upload(Path(folder), name, FILES, private=private, revision=revision)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> Steering:
        """Read a steering from a folder, from the Hub by its id, or from W&B (``wandb:entity/project/name:version``).

        Raises:
            SteeringError: if there is none, or it is damaged, or of a newer format.
        """
        config, tensors, card = read_checkpoint(source, revision)
        try:
            steering = cls(config)
            steering.load_tensors(tensors)
        except UserError as error:
            raise SteeringError(f"{source}: {error}") from error
        steering.card = card
        steering.key = _digest(tensors)  # so that it is the same one, however often it is loaded
        return steering.requires_grad_(False)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(key.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
