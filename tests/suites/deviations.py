"""
Where MARS departs from transformers' own suites, and why: the one list. `test_deviations.py` holds the suites to it,
and `conftest.py` turns a skip that stands nowhere here into a failure.
"""

import unittest

# Tests that we skip.
SKIPPED: dict[str, dict[str, str]] = {
    "MarsModelSuite": {},
    "MarsProcessorSuite": {
        "test_apply_chat_template_assistant_mask": (
            "`apply_chat_template` refuses `return_assistant_tokens_mask`: users' texts are tokenised apart from the "
            "template's, and no training task of MARS is a chat"
        ),
    },
    "MarsImageProcessorSuite": {},
}

LENIENT = "runs as it is, but with the library's lenient loading: ours refuses a checkpoint that lacks a tensor"
TEXT_ONLY = (
    "runs as it is, on text: it looks all ids up in the text table, and visual ids have a table of their own "
    "(tests/test_generation_suite.py has embeddings of pictures)"
)

# Tests that we replace; most run the library's own under a stated condition.
REPLACED: dict[str, dict[str, str]] = {
    "MarsModelSuite": {
        "test_base_model_prefix_loads_base_weights": LENIENT,
        "test_can_init_all_missing_weights": LENIENT,
        "test_correct_missing_keys": LENIENT,
        "test_model_weights_reload_no_missing_tied_weights": LENIENT,
        "test_inputs_embeds": TEXT_ONLY,
        "test_inputs_embeds_matches_input_ids": TEXT_ONLY,
        "test_keep_in_fp32_modules": (
            "runs as it is, but for the rule that no module may stand in both lists: quantizers read one only, "
            "loading in bfloat16 reads the other only, and the VQ-GAN needs both"
        ),
    },
    "MarsProcessorSuite": {
        "test_model_input_names": "one call either reads pictures or draws: the names are those of both together",
        "test_subprocessor_defaults_1_images": (
            "compares pixels as the library does, sizes by row: the processor groups `image_sizes` by row of text"
        ),
        "test_call_arguments_not_in_processor_kwargs": (
            "allows `height` and `width`: the processor takes them for a picture to be drawn, row by row, and hands "
            "them on for pictures to be read"
        ),
    },
    "MarsImageProcessorSuite": {
        "test_call_numpy_4_channels": "a fourth channel is transparency, laid on white: pictures are always RGB",
        "test_new_models_require_torchvision_backend": (
            "asks that the torchvision class exists where torchvision does, which is not among our requirements"
        ),
    },
}

# What our suites set or replace of the library's beside tests.
SETTINGS: dict[str, dict[str, str]] = {
    "MarsModelSuite": {
        "all_model_classes": "what is tested",
        "_is_composite": "the configuration holds the text model's",
        "test_resize_embeddings": "False: MARS refuses to resize its vocabulary, ids stand at fixed places",
        "test_all_params_have_gradient": "False: the VQ-GAN gets no gradient from a loss on codes",
        "test_can_init_all_missing_weights_before_2023": "True: our files carry no year, and shall be tested",
        "_prepare_for_class": "pictures go to the full model only: the trunk takes no pixels",
    },
    "MarsProcessorSuite": {
        "processor_class": "what is tested",
        "prepare_processor_dict": "an argument of its own to save and load",
    },
    "MarsImageProcessorSuite": {"image_processor_tester_class": "what is tested"},
}

# Reasons for which the suites skip a test themselves, as patterns.
LIBRARY_SKIPS: dict[str, str] = {
    "takes minutes; run with --slow|^test is slow": "the library's slow tests; they also want its variable RUN_SLOW",
    "^[Tt]est requires |should not run on GPU": "hardware or a package that the test environment has not",
    "less than 2 backends|torchvision backend is not available": "torchvision is not among our requirements",
    "(video_processor|feature_extractor|audio_processor) attribute not present|accept videos": "no video, no sound",
    "does not support tools": "the chat template knows no tools",
    "_get_num_multimodal_tokens": "what vLLM asks of a processor of pictures",
    "does not have dict size": "the library's own `SizeDict` is no `dict`",
    "No validation found for `preprocess`": "of image processors before version 5",
    "^test_resize_embeddings is set": "see SETTINGS",
    "grouped_mm|sparse experts|router_logits|MoE": "the experts of MARS are chosen by modality, not by a router",
    "No conversion found": "checkpoints hold the model's own names",
    "encoder-decoder": "a decoder alone",
    "partial rope|axial RoPE|have position embeddings": "Qwen's rotary positions",
    "sliding window mask": "the window is the text configuration's; the test looks for it one level higher",
    "non-text modality tower|does not support SDPA": "MARS is a composite in its configuration only, its trunk is one",
    "MarsModel (class )?has no _keep_in_fp32": "the VQ-GAN is not part of the trunk",
}


def skip_listed(suite: type) -> type:
    """Skip in a suite what `SKIPPED` lists for it."""
    for name, reason in SKIPPED[suite.__name__].items():
        setattr(suite, name, unittest.skip(reason)(getattr(suite, name)))
    return suite
