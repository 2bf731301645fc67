"""Names of targets, and the value that marks none; settings use them without importing torch."""

IGNORE_INDEX = -100  # a target that has no loss
NEXT_TOKEN = "next_token"  # name of the targets [B, T]: the token that follows each position
MASKED_TOKEN = "masked_token"  # name of the targets [B, T]: the token that was at a masked position
REPLACED_TOKEN = "replaced_token"  # name of the targets [B, T]: 0 at each real token
SAMPLING_KEY = "sampling_key"  # name of int64 [B]: what random draws of a row depend on; not counted
LABEL = "label"  # name of the targets [B]: the class of each row
LABELS = "labels"  # name of the targets [B, K]: 1 for each class that a row has, else 0
TOKEN_LABEL = "token_label"  # name of the targets [B, T]: the class of a word, at its first token
NUMBER = "number"  # name of the targets [B], float: what a regression predicts; any value may be real
ROW = "row"  # name of the targets [B]: 0 for each row that counts, where there is no class to say so
PAIR = "pair"  # name of the targets [B]: 0 at the first row of each sequence
SCORE = "score"  # name of the targets [B], float: how similar a sequence's texts are
ANSWER = "answer"  # name of the targets [B, T]: the token that follows each position, if it is of the answer
PREFERENCE = "preference"  # name of the targets [B]: 0 at the first row of each pair of answers that counts
REFERENCE_LOGP = "reference_logp"  # name of float [B]: log-probability of each answer by the reference
