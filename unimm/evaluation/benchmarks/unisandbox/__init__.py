"""UniSandBox (arXiv 2511.20561): reasoning and knowledge that must show in an image."""
