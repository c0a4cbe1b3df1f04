"""The tolerance of tests in float32."""


def assert_close(got, expected):
    """The project's tolerance in float32: 1e-4 of the largest value."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
