export type Uuid = string

/** ISO 8601 with an offset: new Date(…) reads it. */
export type Timestamp = string

type Json = { [key: string]: unknown }

type TrackAnswer = {
  usage_id: Uuid | null
  status: Status | null
  expires_at: Timestamp | null
  group: GroupRef | null
  kind: string
  cost: number
  limits: LimitStatus[]
  /** Limits that only observe, and had no room for it. */
  would_deny: LimitStatus[]
  /** The smallest of the enforced limits'; null: unlimited. */
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
