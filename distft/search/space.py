"""The values among which a search chooses for a setting, and what it draws of them. Arithmetic only."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from random import Random
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from distft.config import Settings

_FACTORS = (0.8, 1.25)  # by which a fork of a population multiplies a number
Finite = Annotated[float, Field(allow_inf_nan=False)]
Values = dict[str, Any]  # by dotted key: what a trial sets


class ChoiceConfig(Settings):
    """One of a list of values; a list alone means the same."""

    type: Literal["choice"] = "choice"
    values: list[Any] = Field(min_length=1)

    @field_validator("values")
    @classmethod
    def _check(cls, values: list[Any]) -> list[Any]:
        for index, value in enumerate(values):
            if any(type(value) is type(other) and value == other for other in values[:index]):
                raise ValueError(f"the value {value!r} is there twice")
        return values

    def draw(self, share: float) -> Any:
        """The value at `share`, in [0, 1), of the distribution."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]

    def checked_values(self) -> list[Any]:
        """Values that are checked before the search starts: each one, or both ends."""
        return self.values

    def perturbed(self, value: Any, random: Random) -> Any:
        """A neighbour of `value`."""
        if value not in self.values:
            return self.draw(random.random())
        index = self.values.index(value) + random.choice((-1, 1))
        return self.values[min(max(index, 0), len(self.values) - 1)]


class _Range(Settings):
    low: Finite
    high: Finite

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} must be less than high={self.high:g}")
        return self

    def checked_values(self) -> list[Any]:
        return [self.low, self.high]

    def perturbed(self, value: float, random: Random) -> Any:
        return min(max(value * random.choice(_FACTORS), self.low), self.high)


class UniformConfig(_Range):
    """A number between two others, each as likely."""

    type: Literal["uniform"] = "uniform"
    step: float | None = Field(None, gt=0, allow_inf_nan=False)  # draw low, low + step, ... only

    @model_validator(mode="after")
    def _check_step(self) -> Self:
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step={self.step:g} is more than the distance from low to high")
        return self

    def draw(self, share: float) -> float:
        if self.step is None:
            return self.low + share * (self.high - self.low)
        return self._rounded(self.low + share * (self.high - self.low + self.step) - self.step / 2)

    def checked_values(self) -> list[Any]:
        return [self.low, self._rounded(self.high)]

    def perturbed(self, value: float, random: Random) -> float:
        return self._rounded(super().perturbed(value, random))

    def _rounded(self, value: float) -> float:
        """The nearest value that may be drawn."""
        if self.step is None:
            return value
        most = math.floor((self.high - self.low) / self.step + 1e-9)
        return self.low + min(max(round((value - self.low) / self.step), 0), most) * self.step


class LogUniformConfig(_Range):
    """A positive number whose logarithm is uniform, such as a learning rate."""

    type: Literal["log_uniform"] = "log_uniform"
    low: float = Field(gt=0, allow_inf_nan=False)

    def draw(self, share: float) -> float:
        value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return min(max(value, self.low), self.high)


class IntUniformConfig(Settings):
    """An integer from `low` to `high`, both included."""

    type: Literal["int_uniform"] = "int_uniform"
    low: int = Field(ge=-(2**53), le=2**53)
    high: int = Field(ge=-(2**53), le=2**53)
    step: int = Field(1, ge=1)  # draw low, low + step, ... only

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must be less than high={self.high}")
        if self.step > self.high - self.low:
            raise ValueError(f"step={self.step} is more than the distance from low to high")
        return self

    @property
    def num_values(self) -> int:
        return (self.high - self.low) // self.step + 1

    def draw(self, share: float) -> int:
        return self.low + self.step * min(int(share * self.num_values), self.num_values - 1)

    def checked_values(self) -> list[Any]:
        return [self.low, self.low + (self.num_values - 1) * self.step]

    def perturbed(self, value: int, random: Random) -> int:
        index = round((value * random.choice(_FACTORS) - self.low) / self.step)
        return self.low + self.step * min(max(index, 0), self.num_values - 1)


DistributionConfig = Annotated[
    ChoiceConfig | UniformConfig | LogUniformConfig | IntUniformConfig, Field(discriminator="type")
]
Distribution = ChoiceConfig | UniformConfig | LogUniformConfig | IntUniformConfig
Space = Mapping[str, Distribution]


def random_point(space: Space, seed: int, number: int) -> Values:
    """Trial `number` of a random search: a function of the seed and the number alone."""
    return {key: one.draw(Random(f"{seed} {number} {key}").random()) for key, one in space.items()}


def grid_points(space: Mapping[str, Sequence[Any]]) -> list[Values]:
    """All combinations of the values; the last key changes fastest."""
    return [dict(zip(space, values, strict=True)) for values in product(*space.values())]


def explored(values: Values, space: Space, resample_probability: float, random: Random) -> Values:
    """The settings of a fork: each of the parent's drawn anew, or perturbed."""
    return {
        key: one.draw(random.random())
        if random.random() < resample_probability
        else one.perturbed(values[key], random)
        for key, one in space.items()
    }
