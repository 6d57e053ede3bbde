-- Optional: sweeps expired holds every minute, so that the ledger says `expired` soon, not only after the next call for
-- their group. Nothing depends on it: expired holds never cause a denial, swept or not.
-- It needs the extension pg_cron (Supabase: Database, Extensions). Applying it again replaces the job.
-- To stop it:  select cron.unschedule('tokenlimits-tidy');

select cron.schedule('tokenlimits-tidy', '* * * * *', 'select tokenlimits.tidy()');
