"""Stand-in: values that the suite builds configurations with, other than composite ones such as MARS's."""

config_common_kwargs = {"return_dict": False, "output_hidden_states": True, "chunk_size_feed_forward": 5}
