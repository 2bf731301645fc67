"""A matrix product of a model, as the counts of FLOPs see it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product per token: `name` begins the weight's name, `before` those of parameters before it."""

    name: str
    numel: float  # multiply-adds per token
    before: tuple[str, ...] = ()
    flops_per_pair: float = 0  # of the attention that follows it
    flops_per_local_pair: float = 0  # of one with a window
    before_alone: tuple[str, ...] = ()  # like `before`, but before none of the products that follow
    # Its input depends on these alone; empty: on none, as that of data; None: on all before it
    depends_on: tuple[str, ...] | None = None

    def scaled(self, factor: float, *, prefix: str = "", before: tuple[str, ...] = ()) -> "Product":
        """The same in rows of which it has `factor` tokens for each, behind `before` too.

        `prefix` is put before all of its own names.
        """

        def named(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(f"{prefix}{name}" for name in names)

        return Product(
            name=f"{prefix}{self.name}",
            numel=self.numel * factor,
            before=(*named(self.before), *before),
            flops_per_pair=self.flops_per_pair * factor**2,
            flops_per_local_pair=self.flops_per_local_pair * factor**2,
            before_alone=named(self.before_alone),
            depends_on=None if self.depends_on is None else named(self.depends_on),
        )
