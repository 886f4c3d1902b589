from preceptor.cli.app import main

main()
