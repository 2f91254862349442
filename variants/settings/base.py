"""What the settings of all methods share, and what a field says of itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
PerMember = list[PositiveInt] | PositiveInt

# What a setting is to those who handle settings of any method: packs, studies, budgets.
#     rank           a rank of each site; one for each member; follows from a budget, and is 1 until that is solved
#     alpha          the numerator of the scale; one for each member; follows from a budget
#     rank pattern   module -> rank, and module -> alpha, where a site has another; one for each member; follow from a budget
#     total          ranks or parameters of all sites together; follows from a budget
#     member         one for each member
#     steps          a number of steps, which a study may give as a share of the run, "10%"
Role = Literal["rank", "alpha", "rank pattern", "alpha pattern", "total", "member", "steps"]
PER_MEMBER: tuple[Role, ...] = ("rank", "alpha", "member")
BY_PATTERN: tuple[Role, ...] = ("rank pattern", "alpha pattern")
FROM_BUDGET: tuple[Role, ...] = ("rank", "alpha", "total", *BY_PATTERN)


@dataclass(frozen=True)
class Facts:
    """What `setting` says of a field, beside its type, its default and its docstring.

    role: see `Role`; None where only the method itself reads it.
    added_later: it came when runs without it existed already; see `Settings.identity`.
    only_with: (another setting, the values of it with which this one has an effect); refused with any other.
    """

    role: Role | None = None
    added_later: bool = False
    only_with: tuple[str, tuple[str, ...]] | None = None


def setting(
    default: Any = ...,
    *,
    role: Role | None = None,
    added_later: bool = False,
    only_with: tuple[str, tuple[str, ...]] | None = None,
) -> Any:
    """A field with its facts (see `Facts`); without a default it has to be given.

    A class that declares the field again, with another default or type, need not repeat the facts.
    """
    return Field(default, json_schema_extra={"facts": Facts(role, added_later, only_with)})  # type: ignore[dict-item]


class Settings(BaseModel):
    """Settings of a method: keyword-only, frozen, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
    facts: ClassVar[Mapping[str, Facts]] = {}  # of each field, in order
    takes_targets: ClassVar[bool] = False  # sites are inserted where the targets say

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        before = {name: facts for parent in reversed(cls.__mro__[1:]) for name, facts in getattr(parent, "facts", {}).items()}
        own = {name: (field.json_schema_extra or {}).get("facts") for name, field in cls.model_fields.items()}
        cls.facts = {name: facts or before.get(name, Facts()) for name, facts in own.items()}

    @classmethod
    def with_role(cls, *roles: Role) -> list[str]:
        """Names of the fields that have one of these roles."""
        return [name for name, facts in cls.facts.items() if facts.role in roles]

    @model_validator(mode="after")
    def _settings_have_effect(self) -> Self:
        for name, facts in self.facts.items():
            if facts.only_with is None or not self.is_changed(name):
                continue
            other, values = facts.only_with
            if self.get(other) not in values:
                raise ValueError(
                    f'{name} = {getattr(self, name)} has no effect with {other} = "{self.get(other)}": take it out'
                )
        return self

    def is_changed(self, name: str) -> bool:
        """Whether a setting has another value than its default."""
        return getattr(self, name) != type(self).model_fields[name].get_default()

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)

    @property
    def allocation(self) -> str:
        """What places the ranks: "none" (no ranks), "uniform", "given" (by patterns), "random", or "learned"."""
        return "none"

    def identity(self) -> dict[str, Any]:
        """What enters the fingerprint of a run.

        A setting that was added later is omitted at its default, so that the runs made before it keep their fingerprints.
        Such a default may therefore never change.
        """
        values = self.model_dump(mode="json")
        return {k: v for k, v in values.items() if not self.facts[k].added_later or self.is_changed(k)}

    @classmethod
    def for_budget(cls, given: Mapping[str, Any], ranks: Mapping[str, int], parameters: int, scale: float) -> dict[str, Any]:
        """The settings whose ranks a budget of parameters gives.

        Args:
            given: what is set already, without what follows from a budget.
            ranks: site -> rank, as equal as the budget allows.
            parameters: of the budget, without those that sites have at rank 0.
            scale: alpha/r of every site.

        Raises:
            ValueError: nothing says what a budget means for this method.
        """
        raise ValueError(
            f"{cls.__name__} has no rule for a budget of parameters: give the method's ranks, without [budget], or write the "
            f"rule (for_budget)"
        )

    # -- members of a pack ---------------------------------------------------------------------------------------------

    def for_member(self, member: int) -> Self:
        """The same settings with every per-member list replaced by that member's value."""
        return self._for_each_list(lambda values: values[member])

    def first_members(self, members: int) -> Self:
        """The same settings with every per-member list cut to so many members."""
        return self._for_each_list(lambda values: values[:members])

    def _for_each_list(self, change: Any) -> Self:
        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, list) else value

        news = {name: changed(getattr(self, name)) for name in self.with_role(*PER_MEMBER)}
        for name in self.with_role(*BY_PATTERN):
            news[name] = {pattern: changed(value) for pattern, value in getattr(self, name).items()}
        return self.model_copy(update={name: new for name, new in news.items() if new != getattr(self, name)})

    def check_members(self, members: int) -> None:
        """
        Raises:
            ValueError: a list of another length than `members`.
        """
        for name in self.with_role(*PER_MEMBER):
            per_member(getattr(self, name), members, name)
        for name in self.with_role(*BY_PATTERN):
            for pattern, value in getattr(self, name).items():
                per_member(value, members, f'{name}["{pattern}"]')


class NoSettings(Settings):
    """A method without settings."""


def together(members: Sequence[Settings]) -> Settings:
    """Settings of one method, one for each member of a pack, as the pack's: lists where they differ (see `for_member`).

    They differ in the settings that have a value for each member, by pattern too; a pattern that one member lacks means the
    rank, or the alpha, that this member has elsewhere.
    """
    first, change = members[0], {}
    if all(one == first for one in members):
        return first
    for name in first.with_role(*PER_MEMBER):
        values = [getattr(one, name) for one in members]
        if any(value != values[0] for value in values):
            change[name] = values
    for name, otherwise in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        if name not in first.facts:
            continue
        patterns = dict.fromkeys(pattern for one in members for pattern in getattr(one, name))
        rows = {pattern: [getattr(one, name).get(pattern, one.get(otherwise)) for one in members] for pattern in patterns}
        change[name] = {p: row[0] if all(value == row[0] for value in row) else row for p, row in rows.items()}
    return first.model_copy(update=change)


def per_member(value: Any, members: int, name: str) -> list[Any]:
    """`value` for each member: a list is taken as it is, anything else is repeated.

    Raises:
        ValueError: a list of another length than `members`.
    """
    values = spread(value, members)
    if len(values) != members:
        raise ValueError(f"{name} = {value} has {len(values)} values for {members} members: give one for each, or one number")
    return values


def spread(value: Any, length: int) -> list[Any]:
    """A list as it is; anything else as often as `length` says."""
    return list(value) if isinstance(value, list | tuple) else [value] * length


def check_order(smaller: str, lower: Any, larger: str, upper: Any, why: str) -> None:
    """
    Raises:
        ValueError: of some member `lower`, the value of the setting `smaller`, is above `upper`, that of `larger`.
    """
    length = max(len(value) if isinstance(value, list) else 1 for value in (lower, upper))
    for low, high in zip(spread(lower, length), spread(upper, length), strict=False):
        if low is not None and low > high:
            raise ValueError(f"{smaller} = {low} is above {larger} = {high}: {why.format(low)}")


def check_bounds(bounds: Mapping[str, tuple[int, int | None] | list[int]]) -> None:
    """
    Raises:
        ValueError: a least rank above the most rank; `bounds`: name -> (least, most).
    """
    for name, (least, most) in bounds.items():
        if most is not None and least > most:
            raise ValueError(f"{name}: least rank {least} is above the most rank {most}: exchange them")
