"""Who may call: certificates, bearer tokens, their rights and their quotas."""
