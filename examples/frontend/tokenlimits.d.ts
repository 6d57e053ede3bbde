// The answers of tokenlimits' functions, for supabase-js: copy this file into your project.
//
//     const supabase = createClient<Database>(url, key)
//     const { data, error } = await supabase.rpc('my_generation_usage')   // data: UserLimit[] | null
//
// If you have types from `supabase gen types`, they say Json where these say what it is: put these functions in the
// place of those. Newer versions of the SQL may add fields and functions.

/** Calendar periods begin in the group's time zone; weeks on Monday; lifetime never ends. */
export type Period = 'minute' | 'hour' | 'day' | 'week' | 'month' | 'lifetime'

/** One pool that the members share, or one for each member. */
export type Scope = 'group' | 'member'

export type Bucket = 'hour' | 'day' | 'week' | 'month'

export type Status = 'reserved' | 'committed' | 'released' | 'refunded' | 'expired'

export type Uuid = string

/** ISO 8601 with an offset: new Date(…) reads it. */
export type Timestamp = string

export type GroupRef = {
  id: Uuid
  /** Null when the group was deleted since. */
  name: string | null
}

export type Limit = {
  kind: string
  period: Period
  scope: Scope
  /** Null: unlimited. 0: blocked. */
  max: number | null
}

/** A limit in its current period. */
export type LimitStatus = Limit & {
  used: number
  /** Null: unlimited. */
  remaining: number | null
  /** Null: never. */
  reset_at: Timestamp | null
}

/** A limit that binds a user. */
export type UserLimit = LimitStatus & { group: GroupRef }

type TrackAnswer = {
  usage_id: Uuid | null
  status: Status | null
  expires_at: Timestamp | null
  group: GroupRef | null
  kind: string
  cost: number
  limits: LimitStatus[]
  /** The smallest of the limits'; null: unlimited. */
  remaining: number | null
  /** When the limit with the least room resets or, when denied, when there will be room; null: never by itself. */
  reset_at: Timestamp | null
  /** An earlier call with the same idempotency key had recorded it. */
  replayed: boolean
}

export type Allowed = TrackAnswer & {
  allowed: true
  reason: null
  error: null
  denied_by: null
  retry_after: null
}

export type Denied = TrackAnswer & {
  allowed: false
  reason: 'not_in_group' | 'no_limit_for_kind' | 'limit_exceeded'
  /** For people: why, and when it resets. */
  error: string
  denied_by: LimitStatus | null
  /** Seconds until reset_at. */
  retry_after: number | null
}

export type TrackResult = Allowed | Denied

/** A request of many that track_generation would have answered with an error; it touches no other. */
export type Refused = Omit<TrackAnswer, 'kind' | 'cost'> & {
  allowed: false
  reason: 'refused'
  error: string
  /** That error's: TL001 not valid, TL002 no such group, TL008 the key is of another request, 22… not readable. */
  code: string
  detail: string | null
  /** Null when it could not be read. */
  kind: string | null
  cost: number | null
  denied_by: null
  retry_after: null
}

/** Of p_max_wait: somebody else held the group for so long; nothing was recorded, ask again. */
export type Busy = TrackAnswer & {
  allowed: false
  reason: 'busy'
  error: string
  denied_by: null
  retry_after: null
}

export type GenerationRequest = {
  user_id: Uuid
  kind: string
  cost?: number
  idempotency_key?: string | null
  group_id?: Uuid | null
  metadata?: Json | null
}

export type Group = {
  id: Uuid
  name: string
  description: string
  priority: number
  timezone: string
  is_default: boolean
  created_at: Timestamp
  updated_at: Timestamp
  limits: Limit[]
}

/** Of a member limit, used is what all members used together, and capacity is max times the members. */
export type GroupLimitUsage = LimitStatus & {
  capacity: number | null
  /** used of capacity, from 0; above 1 after a limit was lowered; null: unlimited. */
  fraction: number | null
}

export type GroupUsage = {
  group: GroupRef
  member_count: number
  limits: GroupLimitUsage[]
}

export type HistoryPoint = {
  bucket: Timestamp
  kind: string
  used: number
  generations: number
}

export type UsageSum = HistoryPoint & { group: GroupRef; timezone: string }

export type User = {
  user_id: Uuid
  email: string | null
}

export type Member = User & { joined_at: Timestamp }

/** What differed from the ledger, as it was and as it is now. */
export type Reconciliation = {
  counters: { kind: string; period: Period; scope: Scope; subject: Uuid; was: number; used: number }[]
  rollup: { kind: string; bucket: Timestamp; was: number; used: number }[]
  /** How many holds would never have expired. */
  holds: number
}

/** A row of the ledger. */
export type UsageRecord = {
  id: Uuid
  group: GroupRef
  user_id: Uuid
  email: string | null
  kind: string
  cost: number
  status: Status
  idempotency_key: string | null
  metadata: Json
  created_at: Timestamp
  settled_at: Timestamp | null
  expires_at: Timestamp | null
}

type Json = { [key: string]: unknown }

/** Arguments and answers of every function. */
export type Functions = {
  // for a signed-in user
  my_generation_usage: { Args: never; Returns: UserLimit[] }
  tokenlimits_version: { Args: never; Returns: { version: number } }

  // for workers, with the secret key
  track_generation: {
    Args: {
      p_user_id: Uuid
      p_kind: string
      p_cost?: number
      p_idempotency_key?: string
      p_group_id?: Uuid
      p_metadata?: Json
    }
    Returns: TrackResult
  }
  track_generations: {
    /** Up to 1,000 requests, answered at the same places; p_max_wait in milliseconds. */
    Args: { p_requests: GenerationRequest[]; p_max_wait?: number }
    Returns: (TrackResult | Refused | Busy)[]
  }
  check_generation: {
    Args: { p_user_id: Uuid; p_kind: string; p_cost?: number; p_group_id?: Uuid }
    Returns: TrackResult
  }
  record_generation: {
    Args: {
      p_user_id: Uuid
      p_kind: string
      p_cost?: number
      p_created_at?: Timestamp
      p_idempotency_key?: string
      p_group_id?: Uuid
      p_metadata?: Json
    }
    Returns: TrackResult
  }
  reserve_generation: {
    Args: {
      p_user_id: Uuid
      p_kind: string
      p_cost?: number
      /** in seconds */
      p_ttl?: number
      p_idempotency_key?: string
      p_group_id?: Uuid
      p_metadata?: Json
    }
    Returns: TrackResult
  }
  commit_generation: { Args: { p_usage_id: Uuid; p_cost?: number }; Returns: TrackResult }
  release_generation: { Args: { p_usage_id: Uuid }; Returns: TrackResult }
  user_generation_usage: { Args: { p_user_id: Uuid }; Returns: UserLimit[] }

  // for admins
  save_group: {
    Args: {
      p_group_id?: Uuid
      p_name?: string
      p_description?: string
      p_priority?: number
      p_timezone?: string
      p_is_default?: boolean
      p_limits?: Limit[]
      /** A new group's id, if it is of your choice; it was never used. */
      p_id?: Uuid
    }
    Returns: Group
  }
  set_group_limit: { Args: { p_group_id: Uuid; p_limit: Limit }; Returns: Group }
  remove_group_limit: {
    Args: { p_group_id: Uuid; p_kind: string; p_period: Period; p_scope: Scope }
    Returns: Group
  }
  delete_group: { Args: { p_group_id: Uuid }; Returns: Group }
  find_groups: {
    Args: { p_group_id?: Uuid; p_name?: string; p_search?: string; p_after?: string; p_page_size?: number }
    Returns: Group[]
  }
  add_group_members: {
    Args: { p_group_id: Uuid; p_user_ids: Uuid[] }
    Returns: { added: number; already: number; unknown: Uuid[] }
  }
  remove_group_members: { Args: { p_group_id: Uuid; p_user_ids: Uuid[] }; Returns: { removed: number } }
  move_group_member: { Args: { p_user_id: Uuid; p_from: Uuid; p_to: Uuid }; Returns: { moved: boolean } }
  group_members: {
    Args: { p_group_id: Uuid; p_after?: Uuid; p_page_size?: number; p_search?: string }
    Returns: Member[]
  }
  find_users: { Args: { p_email: string; p_page_size?: number }; Returns: User[] }
  find_users_by_email: { Args: { p_emails: string[] }; Returns: User[] }
  export_usage: {
    Args: {
      p_group_id?: Uuid
      p_user_id?: Uuid
      p_kind?: string
      p_since?: Timestamp
      p_until?: Timestamp
      /** The `next` of the page before. */
      p_after?: Json
      p_page_size?: number
    }
    /** Without `next` it is the last page. */
    Returns: { rows: UsageRecord[]; until: Timestamp; next: Json | null }
  }
  export_history: {
    Args: {
      p_group_id?: Uuid
      p_kind?: string
      p_bucket?: Bucket
      p_since?: Timestamp
      p_until?: Timestamp
      /** The `next` of the page before. */
      p_after?: Json
      p_page_size?: number
    }
    /** Without `next` it is the last page. */
    Returns: { rows: UsageSum[]; until: Timestamp; next: Json | null }
  }
  top_members: {
    Args: { p_group_id: Uuid; p_kind?: string; p_since?: Timestamp; p_until?: Timestamp; p_count?: number }
    Returns: (User & { used: number; generations: number })[]
  }
  usage_drift: { Args: { p_group_id: Uuid; p_since?: Timestamp }; Returns: Reconciliation }
  tokenlimits_diagnosis: { Args: never; Returns: Json }
  group_usage: {
    /** Without a group all, or the `p_page_size` that come after the name `p_after`. */
    Args: { p_group_id?: Uuid; p_after?: string; p_page_size?: number }
    Returns: GroupUsage[]
  }
  generation_history: {
    Args: {
      p_group_id?: Uuid
      p_kind?: string
      p_bucket?: Bucket
      p_since?: Timestamp
      p_until?: Timestamp
    }
    Returns: HistoryPoint[]
  }
  reset_group_usage: { Args: { p_group_id: Uuid; p_kind?: string }; Returns: { reset_at: Timestamp } }
  refund_generation: { Args: { p_usage_id: Uuid }; Returns: TrackResult }
  reconcile_usage: { Args: { p_group_id: Uuid; p_since?: Timestamp }; Returns: Reconciliation }
}

export type Database = {
  public: {
    Tables: Record<never, never>
    Views: Record<never, never>
    Functions: Functions
  }
}
