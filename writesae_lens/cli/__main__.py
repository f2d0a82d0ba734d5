from writesae_lens_cli import main

main()
