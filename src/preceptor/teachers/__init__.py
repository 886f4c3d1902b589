"""Teachers: online, ensemble, moving average and cached, all behind `signal(batch)`."""
