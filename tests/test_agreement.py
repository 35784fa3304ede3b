from llama_jax.agreement import agreed


def test_agreed_is_the_text_itself_on_one_process():
    assert agreed("x") == "x" and agreed("") == ""
