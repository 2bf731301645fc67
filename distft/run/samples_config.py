"""Settings of the texts that a run generates at each evaluation."""

from pydantic import Field

from distft.config import Settings


class SamplesConfig(Settings):
    """Prompts that the model continues at each evaluation, for reports and trackers.

    All ranks compute them together, without a cache: as much work as `max_new_tokens` rows for each prompt.
    """

    prompts: tuple[str, ...] = Field(min_length=1, max_length=16)
    max_new_tokens: int = Field(48, ge=1, le=512)
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)  # 0: the most likely token
    seed: int = 0  # of what is drawn with a temperature, the same at each evaluation
