-- Optional: sweeps expired holds every minute, so that the ledger says `expired` soon and not only when somebody next
-- tracks for their group. Nothing depends on it: an expired hold never denies anybody, swept or not.
-- It needs the extension pg_cron (Supabase: Database, Extensions). Applying it again replaces the job.
-- To stop it:  select cron.unschedule('tokenlimits-tidy');

select cron.schedule('tokenlimits-tidy', '* * * * *', 'select tokenlimits.tidy()');
