"""The one step that all optimizers of this package share.

gradient -> matrices -> memory -> direction -> scale -> weight decay -> parameter. The optimizers
differ in the memory and in the direction; each is a file of its own beside this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import signature
from itertools import islice
from typing import Any, ClassVar, Unpack, cast, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from steepest.geometry import Euclidean, Geometry, Spectral, StackedSpectral
from steepest.linalg.autocast import without_autocast
from steepest.model.parameter_roles import RoleTable, roles
from steepest.optim import adamw
from steepest.optim.checks import Checks, Rate, check_setting
from steepest.optim.fitting import Fit, broken_gradients, largest_entries
from steepest.optim.linearization import Map, of_adam
from steepest.optim.loading import Loading
from steepest.optim.matrices import Batch, Matrices
from steepest.optim.memory import without_memory
from steepest.optim.momentum import MOMENTUM, Momentum, remember
from steepest.optim.parameter_groups import (
    check_role_settings,
    complete,
    groups_of,
    warn_of_guessed_axes,
)
from steepest.optim.precision import (
    without_frozen_base,
)
from steepest.optim.progress import Progress
from steepest.optim.rates import Rates
from steepest.optim.record import ADAMW, Record, acts_on_entries
from steepest.optim.rounding import Assignment
from steepest.optim.scales import Scale, adamw_ratio, stacked_rank, update_scale
from steepest.optim.settings import Settings, checks_of, has_old_names, modern
from steepest.optim.table import table_of

Parameters = nn.Module | RoleTable | ParamsT


class SteepestDescent(Optimizer):
    """Steepest descent on matrices, AdamW on everything else, in one object.

    The optimizers users import are subclasses that fix the geometry and the memory. `params` is

    - a model: `steepest.roles` decides which parameters get the matrix update; all others go to an
      AdamW group with the rate `adamw_lr`;
    - a table made by `steepest.roles`, to override those decisions by name;
    - parameters, named parameters or groups, as for every `torch.optim` optimizer: all of them get
      the matrix update, except groups with `"geometry": "adamw"`.

    For parameters with more than two axes that come without a model, a group can say
    `"views": [MatrixView, ...]`; by default four and more axes are seen as a convolution.

    Every group is an ordinary one: schedulers act on its `lr`, which may be a tensor. `print` shows
    what each parameter got. What `settings` there are is said by `steepest.optim.Settings`. Frozen
    parameters of integers or float8, the quantized base of an adapter, are in no group.

    Raises:
        ValueError: for settings out of range, parameters that are no matrices, sparse ones, or ones
            of a type that cannot be trained (see `steepest.optim.precision`). Nothing is changed by
            a call that raises.
        FloatingPointError: from `step`, for a gradient with NaN or infinite entries, or with
            entries whose squares overflow where they are needed, before any parameter or state is
            touched; with `nonfinite="skip"` that step is left out instead. Also where a factor of
            the Shampoo family has no root, when some parameters may have moved: it says how many.
        NotImplementedError: from `step`, for parameters sharded by `fully_shard`, unchanged too.
    """

    records: ClassVar[tuple[Record, ...]] = ()
    """What the house knows of this optimizer; the last one is about its defaults."""

    fixed: ClassVar[Checks] = {}
    """Settings of groups that a class does not let change, each with its check."""

    geometries: ClassVar[Mapping[str, str]] = {
        "euclidean": "euclidean", "sign": "sign", "spectral": "spectral", ADAMW: ADAMW,
    }  # fmt: skip
    """What a group can say for its `"geometry"`, and the norm that this is about."""

    def __init__(
        self,
        params: Parameters,
        lr: Rate,
        *,
        geometry: Geometry | str,
        memory: Momentum | None = None,
        scale: Scale = "none",
        length: str = "own",
        options: Mapping[str, Any] | None = None,
        marked: Mapping[str, Any] | None = None,
        **settings: Unpack[Settings],
    ):
        """Make the groups.

        Args:
            params: a model, a role table, parameters or groups.
            lr: length of a step, times s.
            geometry: the norm, or its name in a group.
            memory: of the gradients; none by default.
            scale: shape factor s, see `update_scale`.
            length: of a direction, before the rate and s: its "own", or by what it is measured.
            options: what else a subclass keeps in each group.
            marked: settings by which `marks` are made.
            settings: see `Settings`.
        """
        renamed, length = self._with_length(settings, length)
        if unknown := set(renamed) - set(Settings.__annotations__):
            raise TypeError(f"{type(self).__name__} got unknown settings: {sorted(unknown)}")
        settings = cast(Settings, renamed)
        self.checks = checks_of(type(self))
        self._check("lr", lr)
        for key, value in settings.items():
            if key in self.checks:
                self._check(key, value)
        self.nonfinite = settings.get("nonfinite", "raise")
        self.skipped_steps = 0
        self._fits: dict[int, Fit] = {}
        self._rates = Rates()
        defaults = {
            "lr": lr,
            "geometry": geometry if isinstance(geometry, str) else geometry.name,
            **_fields(Spectral("auto")),
            "mode": 1,
            **({} if isinstance(geometry, str) else _fields(geometry)),
            **({} if memory is None else _fields(memory)),
            "scale": scale,
            "length": length,
            **(options or {}),
            "weight_decay": settings.get("weight_decay", 0.0),
            "decay": settings.get("decay", "decoupled"),
            "heavy_ball": settings.get("heavy_ball", False),
            "maximize": settings.get("maximize", False),
            "state_dtype": settings.get("state_dtype"),
            "rounding": settings.get("rounding", "nearest"),
        }
        adamw_lr = settings.get("adamw_lr")
        if adamw_lr is None:
            adamw_lr = lr * self.adamw_ratio(defaults)  # never the same tensor
        self._adamw_defaults = {
            "lr": adamw_lr,
            "weight_decay": settings.get("adamw_weight_decay", 0.0),
            "betas": settings.get("adamw_betas", (0.9, 0.95)),
            "eps": settings.get("adamw_eps", 1e-8),
            "fused": True,
        }
        own: Any = settings.get("roles")
        if isinstance(own, Mapping):
            own = {
                role: modern(of_role) if isinstance(of_role, Mapping) else of_role
                for role, of_role in own.items()
            }
        if own is not None:
            check_role_settings(own, {*defaults, *self._adamw_defaults, "base_lr"})
        if isinstance(params, nn.Module):
            params = roles(params)
        if isinstance(params, RoleTable):
            warn_of_guessed_axes(params, scale)
            marks = self.marks(params, marked or {})
            super().__init__(self.groups(params, own, marks), defaults)
        elif own:
            raise ValueError(
                f"got roles={{{next(iter(own))!r}: ...}} without a model, so no parameter has a "
                "role; pass the model or steepest.roles(model), or put settings into the groups"
            )
        else:
            super().__init__(params, defaults)

    def _with_length(self, settings: Any, length: str) -> tuple[dict[str, Any], str]:
        """The settings without old names of `length`, and the length."""
        length = modern({"length": length})["length"]
        if not has_old_names(settings):
            return dict(settings), length
        declared = signature(type(self)).parameters.get("length")
        if declared is None:
            return dict(settings), length  # refused as unknown
        renamed = modern(settings)
        old = renamed.pop("length")
        if length not in (declared.default, old):
            raise ValueError(
                f"got length={length!r} and an old name of it that says {old!r}, expected one of "
                "them; pass length alone"
            )
        return renamed, old

    def _check(self, key: str, value: Any) -> None:
        check_setting(key, value, self.checks)

    @classmethod
    def adamw_ratio(cls, defaults: Mapping[str, Any]) -> float:
        """Return the rate of the AdamW group over that of the matrices, where none is given."""
        is_spectral = cls.geometries[defaults["geometry"]] == "spectral"
        return adamw_ratio(defaults["scale"]) if is_spectral else 1.0

    def expected_rms(
        self, group: Mapping[str, Any], outputs: int, inputs: int, stack: int = 1, adam: float = 1.0
    ) -> float | None:
        """Return the root-mean-square entry that an update of an `(outputs, inputs)` matrix has.

        It is exact for gradients of full rank in the sign and spectral geometries.

        Args:
            group: of the matrix.
            outputs, inputs: its shape.
            stack: how many matrices are a stack, which is taken as a whole.
            adam: what ε leaves of a step of Adam's length.

        Returns:
            `None` where the length depends on the gradient.
        """
        lr = float(group["lr"])
        if group["geometry"] == "sign":
            return lr
        if group["length"] == "dual":
            return None
        rank = float(min(outputs, inputs))
        if stack > 1 and group["length"] != "muon":
            rank = stacked_rank(outputs, inputs, stack, group["mode"]) / stack
        scale = update_scale(group["scale"], outputs, inputs)
        return lr * scale * math.sqrt(rank / (outputs * inputs))

    @classmethod
    def marks(
        cls, table: RoleTable, settings: Mapping[str, Any]
    ) -> Mapping[str, Mapping[str, Any]]:
        """Return what groups say of each matrix beside its view: from a key to values by name.

        Args:
            table: the roles of a model.
            settings: of the optimizer, where they are not its defaults.
        """
        return {}

    def groups(
        self, table: RoleTable, own: Any, marks: Mapping[str, Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return the parameter groups of a model; `own` are settings of roles."""
        groups = groups_of(table, own)
        for group in groups:
            if not acts_on_entries(group):
                for key, values in marks.items():
                    group[key] = [values.get(name) for name, _ in group["params"]]
        return groups

    def direction(self, group: dict[str, Any], batch: Batch, N: Tensor) -> Tensor:
        """Return the direction for each matrix of a batch, in the geometry of its group.

        `N` is what memory made of the gradients, `(matrices, out, in)`. The direction may take its
        place, unless it is a single matrix, which may be a view of the memory or the gradient.
        """
        overwrite = len(N) > 1
        if group["geometry"] == "sign":
            return N.sign_() if overwrite else N.sign()
        if group["geometry"] == "euclidean":  # as long as a spectral direction of full rank
            return Euclidean().direction(N) * math.sqrt(min(N.shape[-2:]))
        spectral = Spectral(group["method"], group["steps"], group["dtype"])
        if batch.stack == 1:
            return spectral.direction(N, overwrite=overwrite)
        K, (m, n) = batch.stack, N.shape[-2:]
        stacks = N.unflatten(0, (-1, K))
        D = StackedSpectral(group["mode"], spectral).direction(stacks).flatten(0, 1)
        if group["length"] != "muon":
            return D
        return D * math.sqrt(K * min(m, n) / stacked_rank(m, n, K, group["mode"]))

    def entry_memory(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the states that have an entry for each weight."""
        return (MOMENTUM,) if group.get("momentum") else ()

    def is_linear(self, group: Mapping[str, Any]) -> bool:
        """Whether the steps of a group are lr P⁻¹ M, with a P that is linear while it is fixed.

        Those of AdamW are. A sign or a polar factor is not.
        """
        return acts_on_entries(group)

    def linear_root(self, group: Mapping[str, Any], i: int, G: Tensor, share: float) -> Map:
        """Return X -> sqrt(share) P^-1/2 X for parameter `i` of a linear group; G is its gradient.

        See `steepest.optim.linearization`. A subclass whose steps are linear has its own.
        """
        return of_adam(group, self.state.get(group["params"][i], {}), share, G)

    def start(self, group: dict[str, Any], matrices: Matrices) -> None:
        """Make what is kept for matrices as a whole, where there is none."""

    def remember(self, group: dict[str, Any], batch: Batch) -> Tensor:
        """Add the gradients to the momentum; return what the direction is taken of, stacked."""
        return remember(group, batch)

    def largest_entry(self, group: dict[str, Any], dtype: torch.dtype) -> float:
        """Return the largest gradient entry this group can work with."""
        if acts_on_entries(group):
            return _largest(dtype) ** 0.5
        weights = 1 / (1 - group["momentum"]) if group["heavy_ball"] else 1.0
        return _largest(dtype) / (2 * weights)  # so that no sum or difference overflows

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; for `"geometry": "adamw"` the `adamw_*` settings are the defaults."""
        own = self._adamw_defaults if acts_on_entries(param_group) else {}
        param_group = without_frozen_base(param_group)
        param_group = modern(param_group)
        super().add_param_group({**own, **param_group})
        group = self.param_groups[-1]
        try:
            complete(group, self.geometries, self.checks)
        except Exception:
            self.param_groups.pop()
            raise
        self._fits[id(group)] = Fit(group, checked=True)

    def settings_of(self, group: dict[str, Any]) -> set[str]:
        """Return the settings that a group must have."""
        own = {*self.defaults, "base_lr", "step_count"} - {"differentiable"}  # which torch adds
        return own | self._adamw_defaults.keys() if acts_on_entries(group) else own

    def __getstate__(self) -> dict[str, Any]:
        own = ("nonfinite", "skipped_steps", "_adamw_defaults", "_rates")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.checks = checks_of(type(self))
        self.__dict__.setdefault("_fits", {})  # made anew for a copy
        self.__dict__.setdefault("_rates", Rates())

    def __repr__(self) -> str:
        """Return a table: what each parameter gets."""
        return table_of(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; how parameters are matrices stays as constructed.

        Where names are known, a state goes to the parameter of its name, whatever the order;
        `module.` and `_orig_mod.` in names do not count. Hooks are those of `torch.optim`: what
        they return is loaded, what they change stays.

        Raises:
            ValueError: with the name of the setting or parameter, if groups have other sizes,
                geometries or names, or if settings are wrong. Also if memory is missing, has
                another shape, or is that of another optimizer. Nothing is changed then.
        """
        loading, groups = Loading(self), self.param_groups
        last = self.register_load_state_dict_pre_hook(loading.check)
        first = self.register_load_state_dict_post_hook(loading.convert, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            first.remove()
            self._go_on(groups)

    def _go_on(self, groups: list[dict[str, Any]]) -> None:
        """Take what is known of groups over to those that a loaded state has put in their place."""
        for own, loaded in zip(groups, self.param_groups, strict=False):
            if own is not loaded and id(own) in self._fits:
                fit = self._fits.pop(id(own))
                fit.move_to(loaded)
                self._fits[id(loaded)] = fit
        self._rates.restart(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, to be saved and given to `load_state_dict`.

        Parameters without memory have an empty state, as `torch.distributed.checkpoint` wants one.
        Those with memory have none before their first step, even if it was looked at.
        """
        empty = without_memory(self)

        def fill(_: Optimizer, state_dict: dict[str, Any]) -> None:
            for i in empty:
                state_dict["state"].setdefault(i, {})

        first = self.register_state_dict_post_hook(fill, prepend=True)
        try:
            return super().state_dict()
        finally:
            first.remove()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch._disable_dynamo  # type: ignore[attr-defined]  # it waits for numbers: compiled, every new rate would compile it again
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; with a closure, evaluate it first and return its loss.

        Parameters without a gradient are left alone. So is a matrix, or a parameter of the AdamW
        group, whose gradient is exactly zero (an idle expert): neither weights nor memory move. The
        memory is made all the same, as a step of zero gradients is how checkpoint libraries ask
        for it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [self._work(group) for group in self.param_groups]
        try:
            self._step(work)
        finally:
            for matrices in work:
                matrices.forget_gradients()
        return loss

    def _step(self, work: list[Matrices]) -> None:
        """Check the gradients of all groups; then let one after the other take its step."""
        largest = largest_entries([G for matrices in work for G in matrices.gradients])
        if broken := broken_gradients(self, work, largest):
            if self.nonfinite == "raise":
                raise FloatingPointError(broken)
            self.skipped_steps += 1
            return
        self._rates.watch(self.param_groups)
        progress = Progress(self.param_groups)
        entries = iter(largest)
        try:
            for matrices in work:
                if not matrices.kept:
                    self.make_memory(matrices.group, matrices)
                    matrices.keep(self.state)
            for i, matrices in enumerate(work):
                group = matrices.group
                active = [entry > 0.0 for entry in islice(entries, len(matrices.gradients))]
                progress.begin(i, active)
                assign = Assignment(group["rounding"], seed=(i << 24) + group["step_count"])
                self._descend(group, matrices, active, assign, progress)
                group["step_count"] += any(active)
        except Exception as error:  # undoing it would need a copy of everything
            progress.explain(error)
            raise
        for group in self.param_groups:
            self._fit(group).record()

    def _work(self, group: dict[str, Any]) -> Matrices:
        """Check a group, and return it as matrices; what a step before has worked out is kept."""
        fit = self._fit(group)
        matrices, fit.matrices = fit.matrices, None  # an error in the check forgets it
        if not (fit.check(self) and matrices and matrices.refresh()):
            matrices = Matrices(group)
        fit.matrices = matrices
        return matrices

    def _fit(self, group: dict[str, Any]) -> Fit:
        """What was checked of a group."""
        fit = self._fits.get(id(group))
        if fit is None or fit.group is not group:
            fit = self._fits[id(group)] = Fit(group)
        return fit

    def make_memory(self, group: dict[str, Any], matrices: Matrices) -> None:
        """Make the memory of parameters with a gradient, of zeros, where there is none."""
        if not acts_on_entries(group):
            for key in self.entry_memory(group):
                matrices.entries(self.state, key)
            self.start(group, matrices)
            return
        for p in matrices.params:
            adamw.start(group, p, self.state.setdefault(p, {}))

    @without_autocast
    def _descend(
        self,
        group: dict[str, Any],
        matrices: Matrices,
        active: list[bool],
        assign: Assignment,
        progress: Progress,
    ) -> None:
        if not any(active):
            return
        if acts_on_entries(group):
            adamw.take_step(group, matrices, active, assign)
            return
        for batch in matrices.batches(self.entry_memory(group), active):
            progress.enter(batch.states, batch.outputs, batch.inputs)
            self._take(group, batch, assign)

    def _take(self, group: dict[str, Any], batch: Batch, assign: Assignment) -> None:
        """The step of a batch, whose intermediate results end with it."""
        N = self.remember(group, batch)
        _move(group, batch, self.direction(group, batch, N), assign)


def _move(group: Mapping[str, Any], batch: Batch, D: Tensor, assign: Assignment) -> None:
    """Weight decay, and the step along the direction."""
    lr = float(group["lr"])
    step = lr * update_scale(group["scale"], batch.outputs, batch.inputs)
    step = step if group["maximize"] else -step
    decay = group["weight_decay"] * lr
    if group["decay"] == "independent":
        decay = decay / group["base_lr"] if group["base_lr"] else 0.0
    W = [each.float() for each in batch.W] if assign.rounds(batch.W[0]) else batch.W
    directions = D.unbind(0)
    if decay:
        for weight, each in zip(W, directions, strict=True):
            if group["decay"] == "cautious":
                shrinks = (each * weight * step) < 0
                weight.sub_(weight * shrinks, alpha=decay)
            else:  # foreach would round the factor
                weight.mul_(1 - decay)
    torch._foreach_add_(W, directions, alpha=step)
    if W is not batch.W:
        for weight, exact in zip(batch.W, W, strict=True):
            assign(weight, exact)


def _fields(part: Any) -> dict[str, Any]:
    """The settings of a geometry or of a memory, for a group."""
    settings: dict[str, Any] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        settings |= _fields(value) if is_dataclass(value) else {field.name: value}
    return settings


@cache
def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(torch.promote_types(dtype, torch.float32)).max
