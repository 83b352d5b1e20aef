"""Other people's layers and signatures over ours."""
