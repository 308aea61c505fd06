from webhook_outbox import main

raise SystemExit(main())
