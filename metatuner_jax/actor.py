"""The frozen downstream LLM: its input spliced from template, prompt and query, its answers and their likelihood."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metatuner_jax import decode, transformer
from metatuner_jax.generator import Frozen, Setup


def splice(setup: Setup, prompt, prompt_mask, query, query_mask):
    """Returns the rows `[template | prompt | query]` as (tokens, mask), both [b, t].

    Prompts are spliced as ids; their end token and padding become holes. The last column is real in every row.
    """
    b = prompt.shape[0]
    prefix = jnp.broadcast_to(jnp.array(setup.prefix, jnp.int32), (b, len(setup.prefix)))
    words = prompt_mask & (prompt != setup.end_id)
    tokens = jnp.concatenate([prefix, prompt, query], axis=1)
    return tokens, jnp.concatenate([jnp.ones(prefix.shape, bool), words, query_mask], axis=1)


def begin(setup: Setup, frozen: Frozen, loras, prompt, prompt_mask, query, query_mask, max_tokens: int, **how) -> decode.Writing:
    """Returns the answers with their first token, of at most `max_tokens` with their end token, greedy without a temperature.

    Args:
      loras: None, or the LoRA of each row or of all rows.
      how: key, rows, temperature and layers as in `decode.sample`.
    """
    tokens, mask = splice(setup, prompt, prompt_mask, query, query_mask)
    x = transformer.embed(setup.actor, frozen.actor, tokens)
    prefill = decode.prefill(setup.actor, frozen.actor, x, mask, loras)
    return decode.begin(
        setup.actor, frozen.actor, prefill, max_new_tokens=max_tokens, end_id=setup.end_id, allowed=frozen.allowed, **how
    )


def advance(setup: Setup, frozen: Frozen, loras, state: decode.Writing, layers=None, **how) -> decode.Writing:
    """Returns the answers as `decode.advance` writes them on, with its settings.

    Args:
      layers: the actor's as `transformer.unstack` makes them, where the answers began so.
    """
    params = {**frozen.actor, "layers": layers or frozen.actor["layers"]}
    return decode.advance(setup.actor, params, state, end_id=setup.end_id, allowed=frozen.allowed, loras=loras, **how)


def log_likelihoods(
    setup: Setup, frozen: Frozen, loras, prompt, prompt_mask, query, query_mask, answer, prompt_embedding=None
) -> Float[Array, "b m"]:
    """Returns the log-probability of each token of the given answers, float32, in nats.

    Args:
      prompt_embedding: [b, p, d] in place of the prompt tokens' own (see `generator.relaxed_prompt`).
    """
    c = setup.actor
    tokens, mask = splice(setup, prompt, prompt_mask, query, query_mask)
    start = tokens.shape[1]
    tokens = jnp.concatenate([tokens, answer[:, :-1]], axis=1)
    # Padding stands at the answer's end, where nothing that counts looks at it.
    mask = jnp.concatenate([mask, jnp.ones((tokens.shape[0], answer.shape[1] - 1), bool)], axis=1)
    x = transformer.embed(c, frozen.actor, tokens)
    if prompt_embedding is not None:
        x = jax.lax.dynamic_update_slice(x, prompt_embedding.astype(x.dtype), (0, len(setup.prefix), 0))
    context = transformer.make_context(c, transformer.positions_of(mask), transformer.causal(mask))
    x, _ = transformer.run(c, frozen.actor["layers"], x, context, loras, remat=setup.config.train.remat)
    return transformer.log_likelihoods(c, frozen.actor, x[:, start - 1 :], answer)


def log_likelihood(setup: Setup, frozen: Frozen, loras, prompt, prompt_mask, query, query_mask, answer, answer_mask) -> Float[Array, " b"]:
    """Returns the mean log-likelihood of each answer, in nats per token, its end token included."""
    tokens = log_likelihoods(setup, frozen, loras, prompt, prompt_mask, query, query_mask, answer)
    return jnp.sum(tokens * answer_mask, axis=1) / jnp.maximum(jnp.sum(answer_mask, axis=1), 1)
